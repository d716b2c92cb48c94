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


def with_template(tokenizer_folder, template):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = template
    return tokenizer


DROPS_THOUGHTS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[U]{{ m['content'] }}"
    "{% else %}[A]{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}"
)


def test_answer_that_the_template_cuts_is_refused(tokenizer_folder):
    tokenizer = with_template(tokenizer_folder, DROPS_THOUGHTS)
    answer = ANSWER | {"content": "<think>\nFever.\n</think>\n\nAspirin"}
    with pytest.raises(ValueError, match="drops or rewrites part of the assistant turn"):
        render_example(tokenizer, [QUESTION, answer])
    assert tokenizer.decode(render_example(tokenizer, [QUESTION, ANSWER])[1]) == "Aspirin</s>"


def test_earlier_answers_may_lose_their_thoughts(tokenizer_folder):
    tokenizer = with_template(tokenizer_folder, DROPS_THOUGHTS)
    earlier = ANSWER | {"content": "<think>Fever.</think>Paracetamol"}
    prompt, _ = render_example(tokenizer, [QUESTION, earlier, QUESTION, ANSWER])
    assert tokenizer.decode(prompt).count("Fever.") == 0


def test_system_turn_that_the_template_leaves_out_is_refused(tokenizer_folder):
    tokenizer = with_template(
        tokenizer_folder,
        "{% for m in messages if m['role'] != 'system' %}{{ m.content }}{% endfor %}",
    )
    with pytest.raises(ValueError, match=r"part of the system turn \(content 'Be brief.'\)"):
        render_prompt(tokenizer, "q", system="Be brief.")


def test_answer_may_begin_inside_the_generation_prompt(tokenizer_folder):
    tokenizer = with_template(
        tokenizer_folder,
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}",
    )
    answer = ANSWER | {"content": "<think>\nFever.\n</think>\n\nAspirin"}
    prompt, response = render_example(tokenizer, [QUESTION, answer])
    assert tokenizer.decode(prompt).endswith("[assistant]<think>\n")
    assert tokenizer.decode(response) == "Fever.\n</think>\n\nAspirin</s>"


def test_thinking_part_of_a_message_is_rendered_or_refused(tokenizer, tokenizer_folder):
    answer = ANSWER | {"reasoning_content": "Fever."}
    with pytest.raises(ValueError, match=r"\(reasoning_content 'Fever.'\)"):
        render_example(tokenizer, [QUESTION, answer])
    reads_it = with_template(
        tokenizer_folder,
        "{% for m in messages %}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
        "{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}",
    )
    _, response = render_example(reads_it, [QUESTION, answer])
    assert reads_it.decode(response) == "<think>Fever.</think>Aspirin</s>"


def test_template_that_writes_the_date_gives_equal_ids_on_any_day(tokenizer_folder):
    tokenizer = with_template(
        tokenizer_folder, "{{ strftime_now('%d %b %Y %H:%M:%S') }} {{ messages[0].content }}"
    )
    assert tokenizer.decode(render_prompt(tokenizer, "q")) == "01 Jan 2026 00:00:00 q"


@pytest.mark.parametrize(
    "fault", ["{{ 1 // 0 }}", "{{ messages.x.y }}", "{{ 'a' + 1 }}", "{{ a('b') }}"]
)
def test_fault_of_a_template_is_a_value_error(tokenizer_folder, fault):
    tokenizer = with_template(tokenizer_folder, fault)
    with pytest.raises(ValueError, match="the chat template refuses the conversation: "):
        render_prompt(tokenizer, "q")
