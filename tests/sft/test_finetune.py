"""Stage 1: the packed loss is the plain one, runs resume bit for bit, and every row is seen as
often as asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from verippo.sft.config import SFTConfig
from verippo.sft.finetune import train

SMALL = {
    "dtype": "fp32",
    "gradient_checkpointing": False,
    "max_seq_len": 256,
    "max_tokens_per_gpu": 256,
    "log_to": "jsonl",
}


def write_rows(path: Path, num: int) -> Path:
    rows = [
        {
            "Question": f"What is {n} plus {n}?",
            "Complex_CoT": "Add. " * (n % 5),
            "Response": f"It is {2 * n}.",
        }
        for n in range(num)
    ]
    path.write_text(json.dumps(rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


TWIN = """
import sys, json, torch
from transformers import AutoModelForCausalLM
from verippo.core.training import dist
from verippo.core.training.engine import EngineConfig, TrainEngine
from verippo.core.training.pretrained import (load_policy, load_tokenizer)
from verippo.sft.config import SFTConfig
from verippo.sft.examples import load_examples
from verippo.sft.train import _accumulate
from verippo.sft.finetune import _task

model, data = sys.argv[1:]
dist.init()
tokenizer = load_tokenizer(model)
rows = load_examples(data, tokenizer, limit=None, system=None, workers=1)
config = SFTConfig(model=model, data=data, output="unused", dtype="fp32", gradient_checkpointing=False, max_grad_norm=1e9)

plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
losses, num = [], sum(len(row.response_ids) for row in rows)
for row in rows:  # one by one, plain formulas
    ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
    logprobs = torch.log_softmax(plain(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
    losses.append(-logprobs[len(row.prompt_ids) - 1:].sum())
loss = torch.stack(losses).sum() / num
loss.backward()
before = {name: p.detach().clone() for name, p in plain.named_parameters()}

for stage in (0, 3):
    engine_config = EngineConfig(zero_stage=stage, dtype="fp32", gradient_checkpointing=False, max_grad_norm=1e9)
    policy = load_policy(model, dtype="fp32")
    engine = TrainEngine(policy, engine_config, optimizer=torch.optim.SGD(policy.parameters(), lr=1.0))
    packed_loss, _ = _accumulate(_task(config, tokenizer), engine, rows, 160)
    assert abs(packed_loss - float(loss)) < 1e-6, (stage, packed_loss, float(loss))
    assert engine.step(1.0).applied
    worst = 0.0
    for name, tensor in engine.named_tensors():
        gradient = before[name] - tensor
        worst = max(worst, float((gradient - dict(plain.named_parameters())[name].grad).abs().max()))
    assert worst < 1e-6, (stage, worst)
    print("stage", stage, "ranks", dist.world_size(), "largest gradient difference", worst)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_packed_loss_and_gradient_are_those_of_the_rows_one_by_one(
    ranks: int, make_model: Callable[..., Path], tmp_path: Path, two_ranks: Callable[..., Any]
) -> None:
    script, data = tmp_path / "twin.py", write_rows(tmp_path / "rows.json", 7)
    script.write_text(TWIN)
    result = two_ranks(
        str(script), str(make_model()), str(data), env={} if ranks == 2 else {"VERIPPO_RANKS": "1"}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("largest gradient difference") == 2 * ranks


@pytest.mark.filterwarnings("ignore")
def test_a_run_taken_up_from_a_checkpoint_ends_with_the_same_bits(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = SFTConfig(
        model=str(make_model()),
        data=str(write_rows(tmp_path / "rows.json", 20)),
        output=str(tmp_path / "run"),
        epochs=2,
        batch_size=8,
        learning_rate=1e-2,
        eval_fraction=0.2,
        eval_every=2,
        save_every=2,
        save_total_limit=9,
        **SMALL,
    )
    train(config, resolved={})
    run, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(run, whole)
    for name in ("step-00000004",):
        shutil.rmtree(run / "checkpoints" / name)
    for name in ("latest", "best"):
        (run / "checkpoints" / name).unlink()
    shutil.rmtree(run / "model")
    train(config, resolved={})
    assert (run / "model" / "model.safetensors").read_bytes() == (
        whole / "model" / "model.safetensors"
    ).read_bytes()
    for name in ("metrics", "eval"):
        timeless = [
            [
                {k: v for k, v in row.items() if "second" not in k and "memory" not in k}
                for row in lines(folder / f"{name}.jsonl")
            ]
            for folder in (run, whole)
        ]
        assert timeless[0] == timeless[1]
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == [1, 2, 3, 4]
    # 16 rows to train on, twice, in batches of 8: 4 steps, and every token twice
    assert lines(run / "metrics.jsonl")[-1]["epoch"] == 2.0


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_goes_on_with_another_batch_size_sees_all_rows(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = SFTConfig(
        model=str(make_model()),
        data=str(write_rows(tmp_path / "rows.json", 20)),
        output=str(tmp_path / "run"),
        epochs=1,
        batch_size=8,
        save_every=1,
        save_total_limit=9,
        **SMALL,
    )
    train(config, resolved={})
    for step in (2, 3):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    train(replace(config, batch_size=5), resolved={})
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [0.4, 0.65, 0.9, 1.0]  # 8, then 5, 5 and the last 2
    train(replace(config, batch_size=2, max_steps=6), resolved={})
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["epoch"] == 1.2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *[
            ({name: 0}, f"{name}=0: must be above 0")
            for name in ("max_steps", "limit", "timeout_seconds")
        ],
        *[
            ({name: -1}, f"{name}=-1: must be 0 or more")
            for name in ("learning_rate", "weight_decay", "seed")
        ],
        ({"warmup_ratio": 1.1}, "warmup_ratio=1.1: must lie in 0..1"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SFTConfig(model="m", data="d", output="o", **changes)


@pytest.mark.filterwarnings("ignore")
def test_training_overfits_and_the_model_loads_elsewhere(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = SFTConfig(
        model=str(make_model()),
        data=str(write_rows(tmp_path / "rows.json", 6)),
        output=str(tmp_path / "run"),
        epochs=40,
        eval_data=str(write_rows(tmp_path / "held_out.json", 9)),
        batch_size=6,
        learning_rate=2e-2,
        eval_every=10,
        **SMALL,
    )
    train(config, resolved={})
    losses = [row["loss"] for row in lines(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < 0.2 * losses[0]
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.model_type
        == "llama"
    )
    evaluations = lines(tmp_path / "run" / "eval.jsonl")
    assert evaluations[-1]["token_accuracy"] > evaluations[0]["token_accuracy"]
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_to_stop_at_a_loss_stops_there_and_is_then_done(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    data = str(write_rows(tmp_path / "rows.json", 6))
    config = SFTConfig(
        model=str(make_model()),
        data=data,
        eval_data=data,
        output=str(tmp_path / "run"),
        epochs=40,
        batch_size=6,
        learning_rate=2e-2,
        eval_every=2,
        stop_at_loss=3.0,
        **SMALL,
    )
    train(config, resolved={})
    evaluations = [row["loss"] for row in lines(tmp_path / "run" / "eval.jsonl")]
    assert len(evaluations) < 20
    assert [loss <= 3.0 for loss in evaluations] == [False] * (len(evaluations) - 1) + [True]
    weights = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    train(config, resolved={})
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == weights
    assert len(lines(tmp_path / "run" / "eval.jsonl")) == len(evaluations)
    with pytest.raises(ValueError, match="stop_at_loss=3.0 needs held-out rows"):
        SFTConfig(model="m", data=data, output="o", stop_at_loss=3.0)


@pytest.mark.filterwarnings("ignore")
def test_overlong_rows_are_counted_and_named_or_refused(
    make_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.json", 8)
    rows = json.loads(data.read_text())
    rows[3]["Question"] = "x" * 400
    data.write_text(json.dumps(rows))
    options: dict[str, Any] = {
        "model": str(make_model()),
        "data": str(data),
        "max_steps": 1,
        "batch_size": 2,
        **SMALL,
    }
    train(SFTConfig(output=str(tmp_path / "drop"), **options), resolved={})
    assert (
        "dropped: 1 training rows of 8 are over max_seq_len=256 tokens: rows 3"
        in capsys.readouterr().out
    )
    with pytest.raises(
        ValueError, match="1 training rows of 8 are over max_seq_len=256 tokens: rows 3"
    ):
        train(SFTConfig(output=str(tmp_path / "refuse"), overlong="refuse", **options), resolved={})


def test_a_real_record_trains_a_real_model(
    shared: Path, tmp_path: Path, next_commands: Callable[[Path], list[str]]
) -> None:
    config = SFTConfig(
        model=str(shared / "models" / "stories260K"),
        data=str(shared / "data" / "medical_demo_198.json"),
        limit=20,
        output=str(tmp_path / "run"),
        max_steps=3,
        batch_size=4,
        learning_rate=2e-3,
        **SMALL | {"max_seq_len": 1500, "max_tokens_per_gpu": 1500},
    )
    train(config, resolved={})
    losses = [row["loss"] for row in lines(tmp_path / "run" / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    assert torch.isfinite(torch.tensor(losses)).all()
    used_by = [command.split()[1] for command in next_commands(tmp_path / "run")]
    assert used_by == ["verifier", "ppo", "eval"]
