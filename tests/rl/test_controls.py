"""Options that hold the policy back, in whole runs: on one rank and on two, and resumed."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from verippo.core.sampling.sampler import SamplingParams
from verippo.core.training import model
from verippo.launch import cli
from verippo.rl.config import KLConfig, PPOConfig, VerifierConfig
from verippo.rl.train import train


def run(**settings):
    return rows_of(train(PPOConfig(**settings), resolved={}))


def rows_of(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def same_weights(first, second):
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (first, second))
    return all(torch.equal(a[name], b[name]) for name in a)


CONSTANT = """
def score(rollouts):
    return [0.5 for _ in rollouts]
"""


@pytest.fixture
def indifferent(task, tmp_path):
    """A run in which every response is as good as any other: nothing but the bonus moves it."""
    (tmp_path / "indifferent.py").write_text(CONSTANT)
    policy = AutoModelForCausalLM.from_pretrained(task["policy"])
    policy.lm_head.weight.data *= 10  # a random one leaves no entropy to be won
    policy.save_pretrained(task["policy"])
    verifier = VerifierConfig(kind="function", function="indifferent:score")
    settings = {"advantage": "grpo", "samples_per_prompt": 2, "epochs": 1, "steps": 6}
    return task | settings | {"verifier": verifier}


def test_entropy_bonus_raises_the_entropy(indifferent, tmp_path):
    rows = run(**indifferent | {"entropy_coef": 0.01})
    assert rows[-1]["entropy"] > rows[0]["entropy"] + 0.1
    without = run(**indifferent | {"output": str(tmp_path / "without")})
    assert without[-1]["entropy"] < rows[-1]["entropy"] - 0.1
    assert without[-1]["grad_norm_policy"] == 0.0


@pytest.mark.parametrize("coef", [0.0, 0.01])
def test_entropy_is_part_of_a_training_pass_only_with_the_bonus(indifferent, monkeypatch, coef):
    passes = []
    kernel = model.linear_logprobs

    def recorded(*args, with_entropy=False, **options):
        passes.append((torch.is_grad_enabled(), with_entropy))
        return kernel(*args, with_entropy=with_entropy, **options)

    monkeypatch.setattr(model, "linear_logprobs", recorded)
    run(**indifferent | {"entropy_coef": coef, "steps": 1})
    assert {with_entropy for trains, with_entropy in passes if trains} == {coef > 0}


def test_ratio_mask_is_measured(task):
    rows = run(
        **task
        | {"steps": 2, "epochs": 3, "policy_learning_rate": 2e-2, "clip_low": 0.5, "clip_high": 9.0}
        | {"ratio_mask_low": 0.9, "ratio_mask_high": 1.1}
    )
    assert all(0 < row["ratio_masked_fraction"] < 1 for row in rows)


# --- several options at once ---


@pytest.fixture
def controlled(task, tmp_path):
    (tmp_path / "held_out.json").write_bytes((tmp_path / "problems.json").read_bytes())
    return task | {
        "baseline": task["policy"],
        "eval_data": str(tmp_path / "held_out.json"),
        "sampling": SamplingParams(max_new_tokens=4),
        "kl": KLConfig(coef=0.1, target=0.05),
        "advantage": "rloo",
        "samples_per_prompt": 3,
        "prompts_per_step": 4,
        "refill_groups": 2,
        "reference_refresh_steps": 2,
        "entropy_coef": 0.001,
        "ratio_mask_low": 0.5,
        "ratio_mask_high": 2.0,
        "target_kl": 1e-3,
        "epochs": 6,
        "schedule": "linear",
        "steps": 4,
        "save_every": 2,
        "eval_every": 2,
        "zero_stage": 3,
    }


def policy_steps(rows, config):
    """Optimizer steps of each step, from the rate of the last one: linear, and 0 at the end."""
    total = config.policy_steps
    lasts = [round(total * (1 - row["lr_policy"] / config.policy_learning_rate)) for row in rows]
    return [last - step * config.epochs + 1 for step, last in enumerate(lasts)]


def test_a_resumed_run_has_the_same_beta_reference_and_results(controlled, tmp_path):
    settings = controlled | {"schedule": "constant"}  # its end then does not matter
    rows = run(**settings | {"output": str(tmp_path / "whole")})
    assert len({row["kl_coef"] for row in rows}) == 4
    run(**settings | {"steps": 2})
    resumed = run(**settings)
    for name in ("kl_coef", "kl_mean", "policy_loss", "approx_kl", "episodes", "reference_step"):
        assert [row[name] for row in resumed] == [row[name] for row in rows], name
    assert rows_of(tmp_path / "out", "eval") == rows_of(tmp_path / "whole", "eval")
    assert same_weights(tmp_path / "out", tmp_path / "whole")


def test_two_ranks_give_the_numbers_of_one(controlled, tmp_path, two_ranks):
    config = PPOConfig(**controlled)
    options = {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        for name, value in controlled.items()
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    argv = ["ppo", "--config", str(tmp_path / "run.yaml"), "--output"]
    environment = {"PYTHONPATH": str(tmp_path)}
    done = two_ranks(
        "-m", "verippo.launch.cli", *argv, str(tmp_path / "two"), env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cli.main([*argv, str(tmp_path / "one")])
    one, two = (rows_of(tmp_path / name) for name in ("one", "two"))
    steps = policy_steps(one, config)
    assert policy_steps(two, config) == steps
    assert all(0 < number < config.epochs for number in steps)  # target_kl ended the epochs
    same = """score_mean kl_mean kl_coef policy_loss approx_kl ratio_masked_fraction entropy
        groups_dropped groups_refilled groups_missing episodes grad_norm_policy"""
    for name in same.split():
        expected = [row[name] for row in one]
        assert [row[name] for row in two] == pytest.approx(expected, rel=1e-3, abs=1e-5), name
    assert sum(row["groups_dropped"] for row in one) > 0
    for first, second in zip(*(rows_of(tmp_path / n, "eval") for n in ("one", "two")), strict=True):
        assert second["baseline_right_rate"] == first["baseline_right_rate"]
        assert second.get("start_change") == first.get("start_change")
