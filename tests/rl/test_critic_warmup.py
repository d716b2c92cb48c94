"""A warm-up that ends once the critic has settled."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from verippo.core.sampling.sampler import SamplingParams
from verippo.rl.config import PPOConfig, VerifierConfig
from verippo.rl.critic_warmup import follow_warmup
from verippo.rl.train import train


def ended_at(values, patience):
    """Step after which the warm-up is over; None if it is not."""
    progress = {"kl_coef": 0.1}
    for step, value in enumerate(values, start=1):
        progress |= follow_warmup(progress, step=step, explained_variance=value, patience=patience)
        progress = json.loads(json.dumps(progress))  # as a checkpoint keeps it
        if "critic_warmup_steps" in progress:
            return progress["critic_warmup_steps"]
    return None


@pytest.mark.parametrize(
    ("values", "patience", "step"),
    [
        ([0.0, 0.2, 0.4, 0.5, 0.505, 0.509], 2, 6),  # the best is 0.5, in step 4
        ([0.0, 0.2, 0.4, 0.5, 0.505, 0.511, 0.515], 2, None),  # 0.511 is progress again
        ([0.0, 0.02, 0.0, 0.0], 2, 4),
        ([0.0, 0.0], 1, 2),
        ([0.0, -1.0, math.nan, 0.4], 4, None),
        ([0.3, math.nan, -math.inf, 0.3], 3, 4),
        ([0.1 * n for n in range(9)], 1, None),
    ],
)
def test_warmup_ends_when_nothing_is_gained_for_some_steps(values, patience, step):
    assert ended_at(values, patience) == step


@pytest.fixture
def settings(make_model, problems_file, tmp_path):
    return PPOConfig(
        policy=str(make_model("llama", seed=61)),
        data=str(problems_file),
        output=str(tmp_path / "run"),
        verifier=VerifierConfig(kind="exact"),
        sampling=SamplingParams(max_new_tokens=5),
        critic_warmup_steps=4,
        critic_warmup_settled=1,
        critic_learning_rate=0.0,  # its explained variance stays at 0
        policy_learning_rate=1e-3,
        warmup_ratio=0.0,
        steps=6,
        prompts_per_step=4,
        epochs=1,
        max_prompt_tokens=80,
        max_tokens_per_gpu=512,
        save_every=1,
        save_total_limit=10,
        log_to="jsonl",
        dtype="fp32",
        zero_stage=0,
        gradient_checkpointing=False,
    )


def rates(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["lr_policy"] for line in lines]


def test_policy_trains_over_the_steps_that_the_warmup_leaves(settings):
    """The critic never improves: the warm-up ends with step 2, and four steps are left."""
    folder = train(settings, resolved={})
    assert rates(folder) == pytest.approx([0.0, 0.0, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    whole = load_file(folder / "model" / "model.safetensors")
    for step in (1, 2, 4):  # within the warm-up, at its end, and after it
        resume = str(folder / "checkpoints" / f"step-{step:08d}")
        train(replace(settings, resume=resume), resolved={})
        assert rates(folder) == pytest.approx([0.0, 0.0, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
        resumed = load_file(folder / "model" / "model.safetensors")
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_warmup_without_the_option_lasts_as_planned(settings):
    folder = train(replace(settings, critic_warmup_settled=None), resolved={})
    assert rates(folder) == pytest.approx([0.0] * 4 + [1e-3, 0.5e-3])
