"""Training rows: what is read, what is refused, and where the loss lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from verippo.core.text.chat import render_prompt
from verippo.core.training.pretrained import load_tokenizer
from verippo.sft.conversations import read_conversation
from verippo.sft.examples import load_examples


def load(path: Path, tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> Any:
    path.write_text(json.dumps(rows))
    return load_examples(
        str(path), tokenizer, limit=None, system=None, workers=options.get("workers", 1)
    )


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "verippo"


def test_a_record_becomes_the_published_target_text_and_ends_with_one_end_token(
    tmp_path: Path, tokenizer: Any
) -> None:
    row = {"Question": "What?", "Complex_CoT": "A fever.", "Response": "Flu", "options": {"A": "x"}}
    (example,) = load(tmp_path / "d.json", tokenizer, [row])
    assert (
        tokenizer.decode(example.response_ids)
        == "## Thinking\n\nA fever.\n\n## Final Response\n\nFlu</s>"
    )
    assert example.response_ids[-1] == tokenizer.eos_token_id
    assert list(example.prompt_ids) == render_prompt(
        tokenizer, "What?"
    )  # what the model is asked with later on


def test_a_record_without_reasoning_keeps_the_format() -> None:
    turns = read_conversation({"Question": "q", "Response": "a"}, where="row 0").turns
    assert turns[-1]["content"] == "## Thinking\n\n\n\n## Final Response\n\na"


def test_both_conversation_forms_give_the_same_turns() -> None:
    messages = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    }
    shared_form = {
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    }
    assert read_conversation(messages, where="") == read_conversation(shared_form, where="")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"Question": "q"}, "row 1: no key 'Response'"),
        ({"Question": "q", "Response": " "}, "row 1: 'Response' is empty"),
        ({"Question": "q", "Response": "a", "Complex_CoT": 3}, "row 1: 'Complex_CoT' is int"),
        (
            {"messages": [{"role": "user", "content": "q"}]},
            "row 1: the last turn is not the assistant's",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "\n"},
                ]
            },
            "row 1: the assistant's turn",
        ),
        (
            {"messages": [{"role": "doctor", "content": "q"}]},
            "row 1, turn 0: needs a role of assistant, system, user",
        ),
        (
            {"messages": [{"role": ["user"], "content": "q"}]},
            "row 1, turn 0: needs a role of assistant, system, user",
        ),
        ({"Question": "q\ud800", "Response": "a"}, "row 1: 'Question' holds an unpaired surrogate"),
        ({"messages": "text"}, "row 1: its turns are not a list"),
    ],
)
def test_a_bad_row_is_refused_by_its_number(
    tmp_path: Path, tokenizer: Any, row: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        load(tmp_path / "d.json", tokenizer, [{"Question": "q", "Response": "a"}, row])


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="row 0: the chat template rewrites the prompt"):
        load(tmp_path / "d.json", tokenizer, [{"Question": "q", "Response": "a"}])


def test_what_a_template_writes_after_the_end_token_is_not_trained_on(
    tmp_path: Path, tokenizer: Any
) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>\n{% endfor %}"
    (example,) = load(tmp_path / "d.json", tokenizer, [{"Question": "q", "Response": "a"}])
    assert tokenizer.decode(example.response_ids).endswith("a</s>")


def test_tokenising_is_cached_by_content_and_in_parallel_gives_the_same(
    tmp_path: Path, tokenizer: Any, own_cache: Path
) -> None:
    rows = [{"Question": f"q {n}", "Response": f"a {n}"} for n in range(20)]
    first = load(tmp_path / "a.json", tokenizer, rows)
    assert len(list(own_cache.iterdir())) == 1
    assert load(tmp_path / "b.json", tokenizer, rows) == first
    assert len(list(own_cache.iterdir())) == 1
    changed = load(
        tmp_path / "b.json",
        tokenizer,
        rows[:-1] + [{"Question": "other", "Response": "a"}],
        workers=2,
    )
    assert len(list(own_cache.iterdir())) == 2
    assert changed[:-1] == first[:-1]
    assert changed[-1] != first[-1]


def test_rows_of_weight_zero_are_left_out_and_counted(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    user = {"role": "user", "content": "q"}
    rows = [
        {"messages": [user, {"role": "assistant", "content": "bad", "weight": 0}]},
        {"messages": [user, {"role": "assistant", "content": "good"}]},
    ]
    (example,) = load(tmp_path / "d.json", tokenizer, rows)
    assert tokenizer.decode(example.response_ids) == "good</s>"
    assert "left out 1 rows whose answer has weight 0" in capsys.readouterr().out


def test_column_that_no_row_has_is_mentioned(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"Question": "q", "Complex_Cot": "misspelt", "Response": "a"}] * 2
    load(tmp_path / "d.json", tokenizer, rows)
    assert "has 'Complex_CoT': all answers are trained without reasoning" in capsys.readouterr().out
    load(tmp_path / "e.json", tokenizer, [*rows, rows[0] | {"Complex_CoT": "t"}])
    assert "has 'Complex_CoT'" not in capsys.readouterr().out


def test_rows_are_cached_whatever_the_day(tmp_path: Path, tokenizer: Any, own_cache: Path) -> None:
    tokenizer.chat_template = (
        "{{ strftime_now('%H:%M:%S.%f') }} {% for m in messages %}{{ m.content }}{% endfor %}"
    )
    (example,) = load(tmp_path / "d.json", tokenizer, [{"Question": "q", "Response": "a"}])
    assert list(example.prompt_ids) == render_prompt(tokenizer, "q")
