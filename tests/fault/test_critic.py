"""The options of the critic that keep state, in runs that are killed."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from verippo.launch import cli

OPTIONS = {
    "keep_rollouts": "true",
    "critic_freeze": "attention",
    "critic_warmup_steps": 4,
    "critic_warmup_settled": 2,
    "zero_stage": 3,
}


@pytest.fixture(scope="module")
def kept(runs, tmp_path_factory):
    """Folder of an uninterrupted PPO run with the options."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    cli.main(runs.arguments("ppo", folder, **OPTIONS))
    return folder


def critic_arguments(runs, kept, output):
    options: dict[str, Any] = {
        "model": runs.model,
        "data": kept / "rollouts",
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
    runs, kept, start, wait_for_steps, check_same, tmp_path, capfd
):
    output = tmp_path / "run"
    argv = runs.arguments("ppo", output, **OPTIONS | {"save_every": 2})
    kill_after(start, wait_for_steps, argv, output, 3)
    cli.main(argv)
    assert "resuming after step" in capfd.readouterr().out
    check_same(output, kept)
    files = sorted((kept / "rollouts").iterdir())
    assert len(files) == 7
    for file in files:
        assert (output / "rollouts" / file.name).read_bytes() == file.read_bytes()
    assert len(list((output / "rollouts").iterdir())) == 7


def test_killed_pretraining_ends_with_the_same_bits(
    runs, kept, start, wait_for_steps, check_same, tmp_path, capfd
):
    whole, output = tmp_path / "whole", tmp_path / "run"
    cli.main(critic_arguments(runs, kept, whole))
    argv = critic_arguments(runs, kept, output)
    kill_after(start, wait_for_steps, argv, output, 3)
    cli.main(argv)
    assert "resuming after step" in capfd.readouterr().out
    check_same(output, whole)
    before = load_file(runs.model / "model.safetensors")
    after = load_file(output / "model" / "model.safetensors")
    for name, tensor in before.items():
        if "self_attn" in name or "embed_tokens" in name:
            assert torch.equal(after[name], tensor), name
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])
