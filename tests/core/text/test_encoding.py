"""Strings of special tokens in users' text are ordinary text; a template's own are control tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from verippo.core.text import encoding
from verippo.core.text.chat import render_example, render_prompt
from verippo.core.text.encoding import decode, encode, protect, special_ids, unprotect
from verippo.core.text.verifier_text import verifier_input

SPECIAL = ("<|im_start|>", "<|im_end|>", "<unk>", "!")


def fast(backend):
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", unk_token="<unk>"
    )


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["im_start im_end"] * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    )
    return fast(backend)


def unigram():
    # the special tokens are pieces of the model too, as in SentencePiece models
    pieces = [("<unk>", 0.0), *((text, 0.0) for text in SPECIAL if text != "<unk>"), ("▁", -2.0)]
    pieces += [(chr(code), -5.0) for code in range(33, 127)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return fast(backend)


@pytest.fixture(scope="module", params=["byte_level", "unigram", "stories260K"])
def tokenizer(request):
    if request.param == "stories260K":
        shared = request.getfixturevalue("shared")
        return AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    return {"byte_level": byte_level, "unigram": unigram}[request.param]()


def test_no_special_token_can_be_written_by_a_question(tokenizer):
    plain = render_prompt(tokenizer, "a question", system="a system")
    counts = {token: plain.count(token) for token in special_ids(tokenizer).values()}
    for text, token in special_ids(tokenizer).items():
        ids = render_prompt(tokenizer, f"a{text} question", system=f"a {text}system")
        unknown = tokenizer.unk_token_id
        assert all(ids.count(n) == counts[n] for n in counts if n != unknown), text
        assert token == unknown or ids.count(token) == counts[token]


def test_no_special_token_of_an_answer_ends_it_early(tokenizer):
    for text in special_ids(tokenizer):
        turns = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": f"One.{text} Two."},
        ]
        _, response = render_example(tokenizer, turns)
        control = [n for n in response if n in special_ids(tokenizer).values()]
        assert [n for n in control if n != tokenizer.unk_token_id] == [tokenizer.eos_token_id]
        assert response[-1] == tokenizer.eos_token_id
        assert "Two." in tokenizer.decode(response)


def test_no_special_token_reaches_a_verifier(tokenizer):
    for text, token in special_ids(tokenizer).items():
        for pair in ((f"x {text} y", "z"), ("x", f"y {text}"), (text, text)):
            ids, num_cut = verifier_input(
                tokenizer, *pair, template="{response} or {reference}", max_tokens=999
            )
            assert token == tokenizer.unk_token_id or token not in ids
            assert num_cut == 0


def test_a_template_of_a_verifier_keeps_its_special_tokens():
    tokenizer = byte_level()
    ids, _ = verifier_input(
        tokenizer, "a<|im_end|>", "b", template="{response}{reference}<|im_end|>", max_tokens=99
    )
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == "a<|im_end|>b<|im_end|>"


@given(st.text(max_size=40))
def test_other_text_is_encoded_as_before(text):
    tokenizer = byte_level_once()
    if not any(special in text for special in SPECIAL):
        assert protect(tokenizer, text) == text
        assert encode(tokenizer, text) == tokenizer.encode(text, add_special_tokens=False)


@given(
    st.lists(st.one_of(st.text(max_size=5), st.sampled_from(["<|im_end|>", "!"])), max_size=6),
)
def test_protected_text_is_read_back_exactly(pieces):
    tokenizer = byte_level_once()
    text = "".join(pieces)
    assert unprotect(tokenizer, protect(tokenizer, text)) == text
    assert tokenizer.decode(encode(tokenizer, protect(tokenizer, text))) == text


def test_the_renamed_tokenizer_gives_equal_ids(tokenizer):
    for text in ("hello  world\n\n a", " x", "x", "a b c"):
        for special in special_ids(tokenizer):
            whole = f"{text}{special}{text}"
            renamed = whole.replace(special, encoding._other_name(special_ids(tokenizer)[special]))
            found = encoding._renamed(tokenizer).encode(renamed, add_special_tokens=False).ids
            assert found == tokenizer.encode(whole, add_special_tokens=False)


def test_decoding_keeps_the_tags_of_a_thought_only():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]})
    ids = tokenizer.encode("<think>a</think>b<|im_end|>", add_special_tokens=False)
    assert decode(tokenizer, ids) == "<think>a</think>b"


_ONCE = []


def byte_level_once():
    if not _ONCE:
        _ONCE.append(byte_level())
    return _ONCE[0]
