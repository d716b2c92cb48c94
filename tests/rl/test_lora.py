"""PPO with adapters: setup, refusals, and a run that is resumed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from verippo.core.sampling.sampler import SamplingParams
from verippo.core.training.engine import FrozenEngine
from verippo.core.training.lora import FrozenBase
from verippo.rl.config import PPOConfig, VerifierConfig
from verippo.rl.lora_config import PPOLoraConfig
from verippo.rl.setup import set_up
from verippo.rl.train import train


@pytest.fixture(scope="module")
def policy(make_model):
    return str(make_model("llama", seed=51))


@pytest.fixture
def given(policy, problems_file, tmp_path):
    """changes -> PPOConfig"""
    known = {
        "policy": policy,
        "data": str(problems_file),
        "output": str(tmp_path / "out"),
        "steps": 3,
        "prompts_per_step": 4,
        "epochs": 1,
        "verifier": VerifierConfig(kind="function", function="verippo_lora_scores:score"),
        "sampling": SamplingParams(max_new_tokens=8),
        "max_prompt_tokens": 80,
        "dtype": "fp32",
        "zero_stage": 2,
        "policy_learning_rate": 1e-2,
        "critic_learning_rate": 1e-2,
        "log_to": "jsonl",
        "lora": PPOLoraConfig(rank=2),
    }
    return lambda **changes: PPOConfig(**known | changes)


@pytest.fixture(autouse=True)
def scores(monkeypatch):
    """A verifier that likes some tokens."""

    def score(rollouts):
        return [sum(rollout.response_ids) % 7 / 7 for rollout in rollouts]

    monkeypatch.setitem(
        __import__("sys").modules, "verippo_lora_scores", SimpleNamespace(score=score)
    )


def num_trained(engine):
    return sum(p.numel() for p in engine.module.parameters() if p.requires_grad)


def test_reference_is_the_policy_itself_unless_another_is_named(given, policy, make_model):
    run = set_up(given())
    assert isinstance(run.reference, FrozenBase)
    assert run.reference.module is run.policy.module
    own = set_up(given(reference=str(make_model("llama", seed=52)))).reference
    assert type(own) is FrozenEngine
    assert type(set_up(given(lora=PPOLoraConfig())).reference) is FrozenEngine


def test_critic_has_adapters_and_a_trained_head_or_is_trained_whole(given):
    small = set_up(given()).critic
    # rank 2; hidden 32, keys and values 16, MLP 64; two layers; and the head
    per_layer = 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)
    assert num_trained(small) == 2 * per_layer + 32
    assert small.module.hf.score.weight.requires_grad
    whole = set_up(given(lora=PPOLoraConfig(rank=2, critic=False))).critic
    assert num_trained(whole) == sum(p.numel() for p in whole.module.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference_refresh_steps": 2}, "reference_refresh_steps=2: with lora.rank=2 the refer"),
        ({"critic_freeze": "attention"}, "critic_freeze=attention: with lora.rank=2 all weights"),
    ],
)
def test_options_without_meaning_are_refused(given, changes, message):
    with pytest.raises(ValueError, match=message):
        given(**changes)
    given(**changes, lora=PPOLoraConfig(rank=0))


def test_critic_that_is_trained_whole_may_be_frozen_in_part(given):
    given(critic_freeze="attention", lora=PPOLoraConfig(rank=2, critic=False))


def test_unknown_targets_are_refused(given):
    with pytest.raises(ValueError, match=r"lora\.targets=nothing: the model has no linear layers"):
        set_up(given(lora=PPOLoraConfig(rank=2, targets="nothing")))


def test_resumed_run_ends_with_the_weights_of_one_that_never_stopped(given, policy, tmp_path):
    settings = {"output": str(tmp_path / "resumed"), "save_every": 1}
    constant = {"warmup_ratio": 0.0, "schedule": "constant"}
    train(given(**settings, **constant, steps=2), resolved={})
    resumed = train(given(**settings, **constant), resolved={})
    expected = train(given(output=str(tmp_path / "unbroken"), **constant), resolved={})
    first, second = (
        load_file(folder / "model/model.safetensors") for folder in (expected, resumed)
    )
    assert first.keys() == second.keys() == load_file(f"{policy}/model.safetensors").keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    start = load_file(f"{policy}/model.safetensors")
    moved = {key for key in start if not torch.equal(start[key], first[key])}
    assert len(moved) == 2 * 7


def test_adapters_cannot_change_within_a_run(given, tmp_path):
    from dataclasses import asdict

    before = given(steps=1)
    train(before, resolved=asdict(before))
    after = given(lora=PPOLoraConfig(rank=4))
    with pytest.raises(
        ValueError, match=r"cannot change within a run: lora .*'rank': 2.*'rank': 4"
    ):
        train(after, resolved=asdict(after))
