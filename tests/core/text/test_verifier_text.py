import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verippo.core.text.verifier_text import (
    TEMPLATE,
    Tiers,
    check_template,
    leading_choice,
    load_template,
    normalise_answer,
    parse_verdict,
    verifier_ids,
    verifier_input,
)


def encode(text):
    """A token for each character: lengths can be counted by eye."""
    return [ord(character) for character in text]


def decode(ids):
    return "".join(map(chr, ids))


def cut(response, reference="ref", *, template="<{response}|{reference}>", max_tokens):
    ids, num_cut = verifier_ids(
        encode, response, reference, template=template, max_tokens=max_tokens
    )
    return decode(ids), num_cut


def test_text_that_fits_is_not_cut():
    assert cut("abcdef", max_tokens=12) == ("<abcdef|ref>", 0)


def test_cut_in_the_middle_worked_by_hand():
    # 11 tokens less the 6 of `<`, `|ref>` leave 5: three from the front, two from the back
    assert cut("abcdefgh", max_tokens=11) == ("<abcgh|ref>", 3)
    assert cut("abcdefgh", max_tokens=10) == ("<abgh|ref>", 4)


def test_placeholder_in_a_response_is_plain_text():
    assert cut("{reference}", max_tokens=99) == ("<{reference}|ref>", 0)
    assert cut("a", "{response}", max_tokens=99) == ("<a|{response}>", 0)


@given(st.text(max_size=60), st.text(max_size=10), st.integers(20, 60))
def test_cut_keeps_both_ends_the_reference_and_the_limit(response, reference, max_tokens):
    text, num_cut = cut(response, reference, max_tokens=max_tokens)
    whole = f"<{response}|{reference}>"
    assert len(text) == min(len(whole), max_tokens)
    assert num_cut == len(whole) - len(text)
    kept = len(response) - num_cut
    front = kept - kept // 2 if num_cut else kept
    assert text == f"<{response[:front]}{response[len(response) - (kept - front) :]}|{reference}>"


def test_reference_that_leaves_no_room_is_refused():
    with pytest.raises(
        ValueError, match=r"take 43 of max_tokens=43.*no room for the response.*reference: 'rrrr"
    ):
        cut("abc", "r" * 40, max_tokens=43)


def test_empty_response_needs_no_room():
    assert cut("", max_tokens=6) == ("<|ref>", 0)


def test_default_template_passes_the_check():
    check_template(TEMPLATE)


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{response}",
        "{reference}",
        "{reference} {response}",
        "{response}{response}{reference}",
        "{response}{reference}{reference}",
    ],
)
def test_template_needs_each_placeholder_once_and_in_order(template):
    with pytest.raises(ValueError, match="needs {response} once and, after it, {reference} once"):
        check_template(template)


def test_tiers_are_the_published_ones():
    assert Tiers() == (1.0, 0.1, 0.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Pneumonia. ", "pneumonia"),
        ("Acute\n  Otitis\tMedia!", "acute otitis media"),
        ('"(42 mL/min)"', "42 ml/min"),
        ("**B**", "b"),
        ("3.5", "3.5"),
        ("Straße", "strasse"),
        ("...", ""),
    ],
)
def test_normalise_answer_ignores_case_spacing_punctuation(text, expected):
    assert normalise_answer(text) == expected


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        " {}\n",
        "{}.",
        "**{}**",
        "**{}.**",
        '"{}"',
        "“{}”",
        "`{}`",
        "```\n{}\n```",
        "```text\n{}\n```",
        "{}!",
        "*{}*\n\n",
        "<think>true or false?</think>\n{}",
        '{{"verdict": "{}"}}',
        '```json\n{{"verdict": "{}"}}\n```',
        "{}。",
    ],
)
@pytest.mark.parametrize(
    ("word", "verdict"),
    [
        ("True", True),
        ("true", True),
        ("TRUE", True),
        ("False", False),
        ("false", False),
        ("正确", True),
        ("错误", False),
        ("真", True),
        ("假", False),
    ],
)
def test_verdict_is_one_whole_word_in_any_wrapping(form, word, verdict):
    assert parse_verdict(form.format(word)) is verdict


@pytest.mark.parametrize(
    "text",
    [
        "untrue",
        "Untrue.",
        "not true",
        "true false",
        "True or False",
        "True because it fits",
        "I answer: True",
        "truely",
        "falsehood",
        "",
        " ",
        "...",
        "**",
        "```\n```",
        "yes",
        "1",
        "不正确",
        "不真",
        "非真",
        "正确错误",
        "True?",
        "T rue",
        "true\nfalse",
        "nottrue",
        "null",
        "<think>True</think>",
        "<think>True",
        '{"verdict": "untrue"}',
        '{"verdict": 1}',
        '{"verdict": null}',
        '{"verdict": [true]}',
        '{"answer": true}',
        '{"verdict": tr',
        "[true]",
        '{"verdict": true} or false',
        "```json\ntrue\nfalse\n```",
        '{"verdict": ' + "[" * 3000,
    ],
)
def test_any_other_text_is_no_verdict(text):
    assert parse_verdict(text) is None


def test_thinking_may_begin_in_the_prompt():
    assert parse_verdict("Is it true? It is not.</think>\n\nFalse") is False
    assert parse_verdict("True</think>") is None


def test_verdict_may_be_a_json_boolean():
    assert parse_verdict('{"verdict": true}') is True
    assert parse_verdict('```json\n{"verdict": false, "why": "other drug"}\n```') is False


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("True\n\nThe given answer matches.", True),
        ("True - same diagnosis", True),
        ("True, they match.", True),
        ("**Final verdict:** False", False),
        ("The answer is True.", True),
        ("False. The answer leaves a choice between two causes.", False),
        ("True（一致）", True),
        ("结论：不一致。参考答案是另一种药", False),
        ("一致", True),
    ],
)
def test_verdict_may_have_a_label_and_a_reason(text, verdict):
    assert parse_verdict(text) is verdict


@pytest.mark.parametrize(
    "text",
    [
        "True/False",
        "True, or False?",
        "It is true that",
        "True enough, but they differ",
        "not true",
        "I think True",
        "True. Though 不一致",
    ],
)
def test_undecided_text_is_no_verdict(text):
    assert parse_verdict(text) is None


@given(st.text(alphabet='untrefalsTF 不正确错误真假.,:-*"`\n', max_size=12))
def test_verdict_is_the_leading_word_and_the_only_one(text):
    words = {"true": True, "false": False, "正确": True, "错误": False, "真": True, "假": False}
    verdict = parse_verdict(text)
    plain = re.sub('[*"`]', "", text).strip(" \n.,").lower()
    if verdict is not None:
        assert any(plain.startswith(word) and words[word] is verdict for word in words)
        opposite = [word for word in words if words[word] is not verdict]
        assert not any(re.search(rf"\b{word}\b", plain, re.ASCII) for word in opposite[:1])


def test_real_reply_forms_are_read(shared):
    forms = json.loads((shared / "cases" / "reply_forms.json").read_text(encoding="utf-8"))
    for form in forms["verdicts"]:
        assert parse_verdict(form["text"]) is form["right"], form["text"]
    kinds = {kind: kind for kind in ("pass", "too simple", "ambiguous answer")}
    for form in forms["judgements"]:
        assert leading_choice(form["text"], kinds) == form["right"], form["text"]


def test_text_that_fits_is_encoded_as_a_whole(tokenizer_folder):
    """Parts encoded one by one would be other ids where a token spans two of them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    template = "Is the {response}er like {reference}s"
    ids, num_cut = verifier_input(tokenizer, "fev", "cough", template=template, max_tokens=99)
    whole = tokenizer.encode("Is the fever like coughs", add_special_tokens=False)
    assert (ids, num_cut) == (whole, 0)


def test_last_newline_of_a_template_file_is_no_part_of_it(tmp_path):
    file = tmp_path / "template.txt"
    file.write_text("{response} or {reference}?</s>\r\n\n")
    assert load_template(str(file)) == "{response} or {reference}?</s>"
    file.write_bytes(b"\xff{response}{reference}")
    with pytest.raises(ValueError, match="template.txt: is not UTF-8 text"):
        load_template(str(file))
