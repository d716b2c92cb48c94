"""The demo with a calculator, at a size that shows only that its parts fit together."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from verippo.core.text.chat import parse_response
from verippo.core.training.pretrained import load_tokenizer
from verippo.launch.demo import demo
from verippo.launch.demo_calculator import CALL, call_of, reply, with_calls
from verippo.launch.demo_task import KINDS, DemoConfig, make_data_and_model
from verippo.search.calculations import generate
from verippo.sft.conversations import read_conversation
from verippo.sft.examples import load_examples

TINY = DemoConfig(
    output="unused",
    task="calculator",
    num_train=64,
    num_eval=16,
    sft_steps=2,
    verifier_steps=2,
    ppo_steps=1,
    rollouts_per_step=8,
)


@pytest.mark.filterwarnings("ignore")
def test_every_stage_runs_and_counts_turns(tmp_path: Path) -> None:
    report = demo(DemoConfig(**vars(TINY) | {"output": str(tmp_path / "demo")}), resolved={})
    assert "Turns per response" in report.read_text()
    stages = json.loads((tmp_path / "demo" / "ppo" / "stages.json").read_text())
    assert all(1 <= row["turns_mean"] <= 2 for row in stages["rows"])


def test_half_of_the_answers_call_and_the_result_is_no_target(tmp_path: Path) -> None:
    make_data_and_model(TINY, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    source = str(tmp_path / "data" / "sft_train.json")
    examples = load_examples(source, tokenizer, limit=3, system=None, workers=1)
    call, answer, direct = (tokenizer.decode(one.response_ids) for one in examples)
    problem = json.loads((tmp_path / "data" / "problems.json").read_text())[0]
    total = problem["Ground-True Answer"]
    found = CALL.search(call.removesuffix("</s>"))
    assert found
    assert sum(int(line.split(" = ")[1]) for line in found[1].split(" ; ")) == int(total)
    before = tokenizer.decode(examples[1].prompt_ids)
    assert before.endswith(f"<|assistant|>{call}<|user|>{total}<|assistant|>")
    for text in (answer, direct):
        parsed = parse_response(text.removesuffix("</s>"))
        assert parsed
        assert parsed.final.isdigit()


def test_call_adds_up_the_points_of_the_findings() -> None:
    steps = "station +1 = 3 , total 3 ; dilation 2 = 1 , total 4"
    expected = "<calc> station +1 = 3 ; dilation 2 = 1 </calc>"
    assert call_of({"Complex_CoT": steps}) == expected
    assert reply(SimpleNamespace(last_text=expected)) == "4"


def test_rows_of_stage_1_are_read() -> None:
    records = generate(6, seed=0, split="train", kinds=KINDS, difficulty=5)
    rows = with_calls(records, seed=0)
    assert [len(read_conversation(row, where="").turns) for row in rows] == [2, 4, 2] * 3


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("<calc> station +1 = 3 ; albumin 3.2 = 11 </calc>", "14"),
        ("so <calc> a = 7</calc> ", "7"),
        ("<calc> nothing </calc>", "0"),
        ("<calc> a = 9999999 </calc>", "0"),
        ("<calc> a = 2 </calc> and more", None),
        ("<calc> a = 2", None),
        ("2 + 3", None),
    ],
)
def test_replies_by_hand(text: str, result: str | None) -> None:
    assert reply(SimpleNamespace(last_text=text)) == result


def test_ablation_of_the_calculator_is_refused() -> None:
    with pytest.raises(ValueError, match="ablation_seeds: task=calculator has no variants"):
        DemoConfig(task="calculator", ablation_seeds=1)
