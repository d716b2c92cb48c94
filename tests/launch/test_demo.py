"""The demo at a size that shows only that its stages fit together; `make demo` shows results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from verippo.core.text.chat import parse_response
from verippo.launch.ablation import VARIANTS, ablate
from verippo.launch.demo import demo
from verippo.launch.demo_methods import METHODS, NUM_CHECKS, worked
from verippo.launch.demo_task import (
    KINDS,
    DemoConfig,
    half_without_reasoning,
    make_data_and_model,
    ppo_config,
    verifier_rows,
)
from verippo.search.calculations import generate
from verippo.sft.conversations import read_conversation

TINY = DemoConfig(
    output="unused",
    num_train=64,
    num_eval=16,
    sft_steps=2,
    verifier_steps=2,
    ppo_steps=1,
    rollouts_per_step=8,
)


@pytest.mark.filterwarnings("ignore")
def test_every_stage_runs_and_is_in_the_report(tmp_path: Path) -> None:
    report = demo(replace(TINY, output=str(tmp_path / "demo")), resolved={})
    page = report.read_text()
    for part in ("after SFT", "after PPO", "Verifier", "Response length"):
        assert part in page
    stages = json.loads((tmp_path / "demo" / "ppo" / "stages.json").read_text())
    assert list(stages["seconds"]) == ["data", "sft", "verifier", "ppo"]
    assert [row["num"] for row in stages["rows"]] == [16, 16]
    # a second run finds everything done and changes nothing
    weights = tmp_path / "demo" / "ppo" / "model" / "model.safetensors"
    before = weights.read_bytes()
    demo(replace(TINY, output=str(tmp_path / "demo")), resolved={})
    assert weights.read_bytes() == before


@pytest.mark.filterwarnings("ignore")
def test_ablation_trains_every_variant_from_the_same_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(VARIANTS["short"])[3:]:
        monkeypatch.delitem(VARIANTS["short"], name)
    table = ablate(replace(TINY, ablation_seeds=1), tmp_path).read_text()
    assert table.count("\n") == 2 + 3
    results = json.loads((tmp_path / "ablation.json").read_text())
    assert len({runs[0]["exact_before"] for runs in results.values()}) == 1


@pytest.mark.filterwarnings("ignore")
def test_ablation_repeats_no_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *others = VARIANTS["long"]
    for name in (second, *others):
        monkeypatch.delitem(VARIANTS["long"], name)
    config = replace(TINY, task="long", ablation_seeds=2, ablation_jobs=2)
    ablate(config, tmp_path)
    summaries = sorted(tmp_path.glob("seed-*/ppo-0/summary.json"))
    assert [path.parts[-3] for path in summaries] == ["seed-0", "seed-1"]
    times = [path.stat().st_mtime_ns for path in summaries]
    summaries[1].unlink()
    ablate(config, tmp_path)
    assert summaries[0].stat().st_mtime_ns == times[0]
    assert summaries[1].stat().st_mtime_ns > times[1]


@pytest.mark.parametrize("method", METHODS)
def test_method_of_a_long_answer_comes_200_tokens_before_it(tmp_path: Path, method: str) -> None:
    config = replace(TINY, task="long")
    make_data_and_model(config, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    for record in json.loads((tmp_path / "data" / "problems.json").read_text()):
        text = worked(record, method)["Complex_CoT"] + "\n\n## Final Response\n\n"
        assert len(tokenizer(text.removeprefix(method))["input_ids"]) >= 200


def test_methods_of_a_long_answer() -> None:
    record = {
        "Complex_CoT": "skin blue = 0 , total 0 ; pulse 80 = 1 , total 1 ; tone active = 2 , total 3"
    }
    answers = {method: worked(record, method) for method in METHODS}
    found = {method: answer["Response"] for method, answer in answers.items()}
    assert found == {"sum": "3", "highest": "2", "count": "3"}
    text = answers["highest"]["Complex_CoT"]
    assert text.startswith(
        "highest : skin blue = 0 ; pulse 80 = 1 ; tone active = 2 , so 2 . check 1 ;"
    )
    assert text.endswith(f" ; check {NUM_CHECKS} ;")


def test_half_of_the_answers_have_no_reasoning() -> None:
    rows = half_without_reasoning(generate(10, seed=0, split="train", kinds=KINDS, difficulty=6))
    parsed = [parse_response(read_conversation(row, where="").turns[-1]["content"]) for row in rows]
    assert [bool(part and part.thinking) for part in parsed] == [True, False] * 5
    finals = [part and part.final for part in parsed]
    assert finals == [row["Ground-True Answer"] for row in rows]


def test_verifier_rows_are_balanced_in_every_wording() -> None:
    rows = verifier_rows(generate(200, seed=0, split="train", kinds=KINDS, difficulty=6), seed=0)
    bare = [row for row in rows if row["response"].isdigit()]
    for part in (rows, bare):
        right = sum(row["label"] for row in part)
        assert abs(right / len(part) - 0.5) < 0.05
    assert all((row["response"] == row["reference"]) == row["label"] for row in bare)


def test_demo_keeps_the_papers_ppo_settings_except_lambda(tmp_path: Path) -> None:
    config = ppo_config(DemoConfig(), tmp_path)
    assert config.kl.coef == 0.03
    assert (config.clip_low, config.clip_high, config.value_clip) == (0.2, 0.2, 0.2)
    assert (config.gamma, config.lam) == (1.0, 1.0)


def test_adapters_of_the_demo_are_trained_beside_its_other_run(tmp_path: Path) -> None:
    config = ppo_config(DemoConfig(lora=True), tmp_path)
    assert (config.lora.rank, config.lora.critic) == (8, True)
    assert config.output == str(tmp_path / "ppo-lora")
    assert (config.policy_learning_rate, config.critic_learning_rate) == (1.5e-3, 5e-3)


def test_sizes_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="findings=9"):
        DemoConfig(findings=9)
    with pytest.raises(ValueError, match="num_eval=1: must be at least 2"):
        DemoConfig(num_eval=1)
    with pytest.raises(ValueError, match="num_train=100: must be at least rollouts_per_step=128"):
        DemoConfig(num_train=100)


def test_folder_of_another_seed_is_refused(tmp_path: Path) -> None:
    config = DemoConfig(num_train=8, num_eval=2, rollouts_per_step=8)
    make_data_and_model(config, tmp_path)
    make_data_and_model(config, tmp_path)
    other = 'holds a demo with .*"seed": 0, .*not .*"seed": 1, .*: choose another folder'
    with pytest.raises(ValueError, match=other):
        make_data_and_model(replace(config, seed=1), tmp_path)
