"""The options of the critic that keep state, in runs that are killed."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from verippo.launch import cli
from verippo.rl.stored_rollouts import write_step

SCORE = """
def score(rollouts):
    return [sum(rollout.response_ids) % 7 / 7 for rollout in rollouts]
"""
OPTIONS = {
    "verifier.kind": "function",
    "verifier.function": "digits:score",
    "keep_rollouts": "true",
    "critic_freeze": "attention",
    "critic_warmup_steps": 4,
    "critic_warmup_settled": 2,
}


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """Makes the verifier's module importable, here and in other processes."""
    (tmp_path / "digits.py").write_text(SCORE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.fixture
def rollouts(tmp_path):
    """Folder of made-up rollouts."""
    draw = random.Random(0)
    rows = [
        {
            "problem": {"question": f"question {number % 8}"},
            "prompt_ids": [draw.randrange(3, 320) for _ in range(4)],
            "response_ids": [draw.randrange(3, 320) for _ in range(6)],
            "rewards": [draw.gauss(0, 1) for _ in range(6)],
        }
        for number in range(24)
    ]
    write_step(tmp_path / "rollouts", 1, rows)
    return tmp_path / "rollouts"


def critic_arguments(runs, rollouts, output):
    options: dict[str, Any] = {
        "model": runs.model,
        "data": rollouts,
        "output": output,
        "critic_freeze": "attention",
        "eval_fraction": 0.25,
        "batch_size": 6,
        "learning_rate": 1e-3,
        "max_steps": 9,
        "max_tokens_per_gpu": 256,
        "save_every": 2,
        "eval_every": 3,
        "zero_stage": 3,
        "dtype": "fp32",
        "gradient_checkpointing": "false",
        "log_to": "jsonl",
    }
    return ["critic", *(part for name in options for part in (f"--{name}", str(options[name])))]


def kill_after(start, wait_for_steps, argv, output, number):
    process = start("-m", "verippo.launch.cli", *argv)
    wait_for_steps(output, number, process)
    time.sleep(0.1)
    process.kill()
    process.wait()


def test_killed_run_keeps_the_rollouts_and_bits_of_an_unbroken_one(
    runs, digits, start, wait_for_steps, check_same, rows_of, tmp_path, capfd
):
    whole, output = tmp_path / "whole", tmp_path / "run"
    cli.main(runs.arguments("ppo", whole, **OPTIONS))
    rows = rows_of(whole)
    assert rows[0]["lr_policy"] == 0.0 < rows[-1]["lr_policy"]
    assert rows[-1]["explained_variance"] != 0.0
    argv = runs.arguments("ppo", output, **OPTIONS | {"save_every": 2})
    kill_after(start, wait_for_steps, argv, output, 3)
    cli.main(argv)
    assert "resuming after step" in capfd.readouterr().out
    check_same(output, whole)
    files = sorted((whole / "rollouts").iterdir())
    assert len(files) == 7
    for file in files:
        assert (output / "rollouts" / file.name).read_bytes() == file.read_bytes()
    assert len(list((output / "rollouts").iterdir())) == 7


def test_killed_pretraining_ends_with_the_same_bits(
    runs, rollouts, start, wait_for_steps, check_same, tmp_path, capfd
):
    whole, output = tmp_path / "whole", tmp_path / "run"
    cli.main(critic_arguments(runs, rollouts, whole))
    argv = critic_arguments(runs, rollouts, output)
    kill_after(start, wait_for_steps, argv, output, 3)
    cli.main(argv)
    assert "resuming after step" in capfd.readouterr().out
    check_same(output, whole)
    before = load_file(runs.model / "model.safetensors")
    after = load_file(output / "model" / "model.safetensors")
    for name, tensor in before.items():
        if name != "lm_head.weight":
            frozen = "self_attn" in name or "embed_tokens" in name
            assert torch.equal(after[name], tensor) == frozen, name
