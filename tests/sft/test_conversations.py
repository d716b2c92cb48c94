"""Forms of training rows: each is read whole, or refused by the name of what would be lost."""

import pytest

from verippo.sft.conversations import Columns, read_conversation

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def read(row, **options):
    return read_conversation(row, where="data d.json: row 3", **options)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "output": "a", "id": 7, "source": "book"},
    ],
)
def test_every_form_gives_the_same_turns(row):
    assert read(row).turns == [USER, ANSWER]


def test_input_follows_its_instruction():
    row = {"instruction": "Translate.", "input": "fever", "output": "a"}
    assert read(row).turns[0]["content"] == "Translate.\n\nfever"


def test_other_columns_can_be_named():
    row = {"query": "q", "cot": "t", "reply": "a", "Response": "another"}
    columns = Columns(question="query", thinking="cot", response="reply")
    turns = read(row, columns=columns).turns
    assert [turn["content"] for turn in turns] == [
        "q",
        "## Thinking\n\nt\n\n## Final Response\n\na",
    ]


def test_system_of_the_row_comes_before_the_option():
    row = {"system": "Be kind.", "conversations": [{"from": "human", "value": "q"}, ANSWER]}
    assert read(row, system="Be brief.").turns[0] == {"role": "system", "content": "Be kind."}
    assert read({"messages": [USER, ANSWER]}, system="Be brief.").turns[0]["content"] == "Be brief."
    own = {"messages": [{"role": "system", "content": "own"}, USER, ANSWER]}
    assert [turn["content"] for turn in read(own, system="Be brief.").turns] == ["own", "q", "a"]


def test_thinking_part_of_a_turn_is_kept():
    row = {"messages": [USER, ANSWER | {"reasoning_content": "t", "thinking": None}]}
    assert read(row).turns[-1] == ANSWER | {"reasoning_content": "t"}


def test_weight_zero_is_obeyed():
    assert read({"messages": [USER, ANSWER | {"weight": 0}]}).skipped
    assert not read({"messages": [USER, ANSWER | {"weight": 1}]}).skipped


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [USER, ANSWER | {"tool_calls": [{"id": 1}]}]}, "turn 1: 'tool_calls' is not"),
        ({"messages": [USER | {"images": ["x.png"]}, ANSWER]}, "turn 0: 'images' is not supported"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, "'tools' is not supported"),
        ({"prompt": "q", "completion": ""}, "'completion' is empty"),
        ({"instruction": "q", "output": 3}, "'output' is int"),
        (
            {"Question": "q", "Complex_CoT": "t ## Final Response\n\nb", "Response": "a"},
            "could not be read back",
        ),
        (
            {"Question": "q", "Complex_CoT": "## Thinking", "Response": "a"},
            "could not be read back",
        ),
        ({"Question": "q", "Complex_CoT": "t</think>u", "Response": "a"}, "could not be read back"),
        (
            {"messages": [USER, ANSWER | {"content": "## Thinking\n\nno end"}]},
            "could not be read back",
        ),
    ],
)
def test_content_that_would_be_lost_is_refused_by_name(row, reason):
    with pytest.raises(ValueError, match=f"data d.json: row 3.*{reason}"):
        read(row)
