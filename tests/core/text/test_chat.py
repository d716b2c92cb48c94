import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from verippo.core.text.chat import (
    DEFAULT_TEMPLATE,
    parse_response,
    render_example,
    render_messages,
    render_prompt,
    render_response,
)

QUESTION, ANSWER = (
    {"role": "user", "content": "Which drug?"},
    {"role": "assistant", "content": "Aspirin"},
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def templated(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    return tokenizer


def test_render_response_writes_the_published_format():
    assert (
        render_response("Think.", "Answer.")
        == "## Thinking\n\nThink.\n\n## Final Response\n\nAnswer."
    )


@given(st.text(), st.text())
def test_parse_response_inverts_render_response(thinking, final):
    assume("##" not in thinking + final)
    assert parse_response(render_response(thinking, final)) == (thinking.strip(), final.strip())


@given(
    st.lists(
        st.sampled_from(["## Thinking", "## Final Response", "\n\n", "\n", "text", " "]), max_size=9
    )
)
def test_parse_needs_each_heading_once_and_in_order(pieces):
    text = "".join(pieces)
    parsed = parse_response(text)
    finals = [n for n in range(len(text)) if text.startswith("## Final Response\n\n", n)]
    thinkings = [n for n in range(len(text)) if text.startswith("## Thinking", n)]
    if len(finals) == 1 and len(thinkings) == 1 and thinkings[0] < finals[0]:
        between = text[thinkings[0] + len("## Thinking") : finals[0]]
        assert parsed == (between.strip(), text[finals[0] + len("## Final Response\n\n") :].strip())
    else:
        assert parsed is None


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "Just an answer.",
        "## Thinking\n\nthought",
        "## Final Response\n\nanswer",
        "## Final Response\n\nanswer\n\n## Thinking\n\nthought",
        "## Thinking\n\na\n\n## Thinking\n\nb\n\n## Final Response\n\nc",
        "## Thinking\n\na\n\n## Final Response\n\nb\n\n## Final Response\n\nc",
        "## Thinking\n\na\n\n## Final Response\nb",
        "## Thinking\n\na\n\n## final response\n\nb",
    ],
)
def test_broken_format_parses_to_none(broken):
    assert parse_response(broken) is None


def test_text_before_the_thinking_is_dropped():
    assert parse_response("So.\n## Thinking\n\na\n\n## Final Response\n\n b \n") == ("a", "b")


def test_default_template_is_used_if_the_tokenizer_has_none(tokenizer):
    assert tokenizer.decode(render_prompt(tokenizer, "Which drug?", system="Be brief.")) == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.</s>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhich drug?</s>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_own_template_of_the_tokenizer_is_preferred(templated):
    assert (
        templated.decode(render_prompt(templated, "Which drug?"))
        == "[user] Which drug?\n[assistant] "
    )


def test_special_tokens_come_from_the_template_alone(tokenizer):
    ids = render_messages(tokenizer, [QUESTION, ANSWER])
    assert ids[0] == tokenizer.bos_token_id == 1
    assert [ids.count(1), ids.count(2)] == [1, 2]
    assert ids[-1] == tokenizer.eos_token_id == 2


@given(question=st.text(min_size=1), answer=st.text(min_size=1))
def test_prompt_and_response_make_up_the_conversation(tokenizer, question, answer):
    assume(answer.strip() and "</s>" not in question + answer)
    prompt, response = render_example(
        tokenizer, [{"role": "user", "content": question}, ANSWER | {"content": answer}]
    )
    assert prompt == render_prompt(
        tokenizer, question
    )  # token for token what the model is asked later
    whole = DEFAULT_HEAD.format("user", question) + DEFAULT_HEAD.format("assistant", answer)
    assert tokenizer.decode(prompt + response, clean_up_tokenization_spaces=False) == f"<s>{whole}"
    assert response[-1] == tokenizer.eos_token_id


DEFAULT_HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n{}</s>"


def test_default_template_names_no_end_token_of_its_own():
    assert "eos_token" in DEFAULT_TEMPLATE
    assert "eot" not in DEFAULT_TEMPLATE


def test_end_token_is_added_if_the_template_writes_none(templated):
    prompt, response = render_example(templated, [QUESTION, ANSWER])
    assert templated.decode(prompt) == "[user] Which drug?\n[assistant] "
    assert templated.decode(response) == "Aspirin\n</s>"


def test_text_after_the_end_token_is_dropped(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = DEFAULT_TEMPLATE.replace("{{ eos_token }}", "{{ eos_token }}\n")
    assert tokenizer.decode(render_example(tokenizer, [QUESTION, ANSWER])[1]) == "Aspirin</s>"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "not the assistant's"),
        ([QUESTION], "not the assistant's"),
        ([QUESTION, ANSWER | {"content": " \n"}], "is empty"),
    ],
)
def test_example_without_an_answer_is_refused(tokenizer, messages, reason):
    with pytest.raises(
        ValueError, match=f"the assistant's turn {reason}|the last turn is {reason}"
    ):
        render_example(tokenizer, messages)


def test_refusal_by_the_template_is_a_value_error(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(
        ValueError, match="the chat template refuses the conversation: System role not supported"
    ):
        render_prompt(tokenizer, "q", system="s")


def test_template_that_rewrites_the_prompt_is_refused(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = (
        "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="rewrites the prompt"):
        render_example(tokenizer, [QUESTION, ANSWER])
