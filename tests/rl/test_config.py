from __future__ import annotations

import ast
import dataclasses
import math
from pathlib import Path

import pytest

from verippo.core.llm.client import LLMConfig
from verippo.core.sampling.sampler import SamplingParams
from verippo.core.training.engine import EngineConfig
from verippo.rl.config import CorrectionConfig, KLConfig, PPOConfig, SamplerConfig, VerifierConfig

ROOT = Path(__file__).resolve().parents[2]
EXACT = VerifierConfig(kind="exact")


def config(**changes):
    return PPOConfig(
        **{"policy": "p", "data": "d", "output": "o", "steps": 3, "verifier": EXACT} | changes
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "give either steps or episodes; got steps=None, episodes=None"),
        ({"episodes": 5}, "give either steps or episodes; got steps=3, episodes=5"),
        ({"steps": 0}, "steps=0: must be above 0"),
        ({"staleness": 1}, r"staleness=1 trains on responses of older weights.*correction\.level"),
        (
            {
                "staleness": 1,
                "correction": CorrectionConfig(level="token"),
                "sampler": SamplerConfig(kind="sglang", urls="http://a", sleep=True),
            },
            r"sampler\.sleep releases the servers' memory during training",
        ),
        ({"steps": None, "episodes": -1}, "episodes=-1: must be above 0"),
        ({"limit": 0}, "limit=0: must be above 0"),
        *[
            ({name: 0}, f"{name}=0: must be at least 1")
            for name in (
                "prompts_per_step",
                "samples_per_prompt",
                "epochs",
                "minibatches",
                "max_prompt_tokens",
                "eval_every",
                "save_every",
                "save_total_limit",
                "log_samples_every",
                "max_skipped_steps",
            )
        ],
        *[
            ({name: 0.0}, f"{name}=0.0: must be above 0")
            for name in (
                "clip_low",
                "clip_high",
                "value_clip",
                "max_logprob_gap",
                "timeout_seconds",
            )
        ],
        *[
            ({name: -0.1}, f"{name}=-0.1: must be 0 or more")
            for name in (
                "policy_learning_rate",
                "critic_learning_rate",
                "weight_decay",
                "eval_temperature",
            )
        ],
        ({"seed": -1}, "seed=-1: must be 0 or more"),
        ({"seed": 2**63}, f"seed={2**63}: must be 0 or more and under"),
        *[
            ({name: 1.1}, f"{name}=1.1: must lie in 0..1")
            for name in ("gamma", "lam", "warmup_ratio")
        ],
        ({"clip_low": 1.1}, "clip_low=1.1: must be above 0 and at most 1"),
        ({"dual_clip": 1.0}, "dual_clip=1.0: must be above 1"),
        ({"policy_learning_rate": math.inf}, "policy_learning_rate=inf: must be 0 or more"),
        ({"max_grad_norm": math.nan}, "max_grad_norm=nan: must be above 0"),
        ({"missing_eos_penalty": math.nan}, "missing_eos_penalty=nan: must be finite"),
        ({"epochs": True}, "epochs=True: must be a number"),
        ({"gamma": True}, "gamma=True: must be a number"),
        ({"gamma": math.nan}, "gamma=nan: must lie in 0..1"),
        ({"policy_learning_rate": math.nan}, "policy_learning_rate=nan: must be 0 or more"),
        ({"eval_fraction": 1.0}, "eval_fraction=1.0: must lie in 0..1"),
        ({"eval_fraction": 0.1, "eval_data": "x"}, "give eval_data or eval_fraction, not both"),
        (
            {"prompts_per_step": 5, "samples_per_prompt": 3, "minibatches": 4},
            r"15 rollouts a step \(prompts_per_step x samples_per_prompt\) do not divide into minibatches=4: choose a divisor",
        ),
        (
            {"advantage": "rloo"},
            "advantage=rloo compares the samples of a prompt: samples_per_prompt must be over 1",
        ),
        ({"advantage": "grpo"}, "advantage=grpo compares the samples of a prompt"),
        (
            {"sampling": SamplingParams(temperature=0)},
            "sampling.temperature=0: training needs samples",
        ),
        (
            {
                "max_tokens_per_gpu": 100,
                "max_prompt_tokens": 90,
                "sampling": SamplingParams(max_new_tokens=11),
            },
            r"max_prompt_tokens \+ sampling.max_new_tokens = 101, over max_tokens_per_gpu=100: raise it or lower the others",
        ),
        ({"verifier": VerifierConfig()}, "verifier.kind=classifier needs verifier.model"),
        (
            {"verifier": VerifierConfig(kind="judge")},
            "verifier.kind=judge needs llm.model, and llm.base_url unless",
        ),
        (
            {"verifier": VerifierConfig(kind="function")},
            "verifier.kind=function needs verifier.function=module:name",
        ),
        (
            {"critic_warmup_settled": 5},
            "critic_warmup_settled=5 ends the warm-up early: give critic_warmup_steps",
        ),
        (
            {"critic_freeze": "attention", "advantage": "reinforce++"},
            r"critic_freeze=attention: advantage=reinforce\+\+ trains no critic: leave it out",
        ),
        ({"critic": "verifier"}, "critic=verifier needs verifier.kind=classifier, got exact: give"),
        (
            {
                "critic": "verifier",
                "critic_head": "kept",
                "verifier": VerifierConfig(model="v"),
            },
            "critic_head=kept: the head of critic=verifier has two classes",
        ),
        ({"log_to": "jsonl,paper"}, "unknown logger 'paper'"),
        ({"offload": "all", "zero_stage": 2}, "offload=all needs zero_stage=3, got zero_stage=2"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0: must be above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_what_was_got(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KLConfig(coef=-0.1), "kl.coef=-0.1: must be 0 or more"),
        (lambda: VerifierConfig(threshold=1.5), "verifier.threshold=1.5: must lie in 0..1"),
        (lambda: VerifierConfig(max_tokens=0), "verifier.max_tokens=0: must be at least 1"),
        (
            lambda: SamplerConfig(kind="factory"),
            "sampler.kind=factory needs sampler.factory=module:name",
        ),
        (lambda: SamplerConfig(max_batch=0), "sampler.max_batch=0: must be at least 1"),
        (
            lambda: SamplerConfig(kind="sglang"),
            "sampler.kind=sglang needs sampler.urls=http://host:port,...",
        ),
        (lambda: SamplerConfig(sleep=True), "sampler.sleep needs sampler.kind=sglang"),
        (lambda: SamplerConfig(concurrency=0), "sampler.concurrency=0: must be at least 1"),
        (lambda: SamplerConfig(bucket_mib=0), "sampler.bucket_mib=0: must be at least 1"),
        (lambda: SamplerConfig(retries=-1), "sampler.retries=-1: must be 0 or more"),
        (lambda: SamplerConfig(timeout_seconds=0), "sampler.timeout_seconds=0: must be above 0"),
        (lambda: SamplerConfig(parity_tolerance=0), "sampler.parity_tolerance=0: must be above 0"),
        (lambda: SamplerConfig(master_port=65536), "sampler.master_port=65536: must be 0"),
        (lambda: SamplingParams(temperature=-1), "sampling.temperature=-1: must be 0 or more"),
        (lambda: SamplingParams(max_new_tokens=0), "sampling.max_new_tokens=0: must be at least 1"),
    ],
)
def test_nested_settings_that_cannot_work_are_refused_by_their_full_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_values_at_the_edge_are_accepted():
    config(
        clip_low=1.0,
        gamma=0.0,
        lam=0.0,
        warmup_ratio=1.0,
        policy_learning_rate=0.0,
        seed=0,
        value_clip=None,
    )
    config(advantage="reinforce++")  # one sample a prompt has its plain form
    config(max_tokens_per_gpu=100, max_prompt_tokens=90, sampling=SamplingParams(max_new_tokens=10))


def test_derived_sizes_worked_by_hand():
    made = config(
        steps=None, episodes=25, prompts_per_step=4, samples_per_prompt=3, minibatches=2, epochs=5
    )
    assert made.rollouts_per_step == 12
    assert made.total_steps == 3  # 25 episodes fill two steps and begin a third
    assert made.policy_steps == made.critic_steps == 3 * 5 * 2
    assert config(steps=7).total_steps == 7


def test_the_defaults_are_the_originals_except_lambda():
    made = config()
    assert (made.epochs, made.minibatches, made.gamma, made.lam) == (3, 1, 1.0, 1.0)
    assert (made.clip_low, made.clip_high, made.value_clip) == (0.2, 0.2, 0.2)
    assert (made.kl.coef, made.kl.estimator, made.verifier.threshold) == (0.03, "k1", 0.4)
    assert (made.verifier.right, made.verifier.wrong, made.verifier.unparsable) == (1.0, 0.1, 0.0)


def test_the_engines_settings_are_those_given():
    made = config(
        zero_stage=1,
        offload="optimizer",
        dtype="fp32",
        gradient_checkpointing=False,
        max_grad_norm=0.3,
        weight_decay=0.2,
    )
    assert made.engine == EngineConfig(
        zero_stage=1,
        offload="optimizer",
        dtype="fp32",
        gradient_checkpointing=False,
        max_grad_norm=0.3,
        weight_decay=0.2,
    )


# --- no field that nothing reads ---

HOLDERS = {
    "config",
    "options",
    "params",
    "sampling",
    "self",
    "kl",
    "verifier",
    "sampler",
    "engine",
    "settings",
}


def fields_read(source):
    """The attributes that the code reads from something called like a configuration, its own checks
    left out."""
    tree = ast.parse(source)
    checks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"
    ]
    left_out = {id(inner) for check in checks for inner in ast.walk(check)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Load)
            and id(node) not in left_out
        ):
            holder = node.value
            name = (
                holder.id
                if isinstance(holder, ast.Name)
                else holder.attr
                if isinstance(holder, ast.Attribute)
                else ""
            )
            if name in HOLDERS:
                yield node.attr


@pytest.mark.parametrize(
    "config_class",
    [PPOConfig, EngineConfig, KLConfig, VerifierConfig, SamplerConfig, SamplingParams, LLMConfig],
)
def test_every_field_is_read_by_some_code(config_class):
    sources = [
        path for folder in ("rl", "core", "launch") for path in (ROOT / folder).rglob("*.py")
    ]
    read = {name for path in sources for name in fields_read(path.read_text())}
    unread = {field.name for field in dataclasses.fields(config_class)} - read
    assert not unread, f"{config_class.__name__}: no code reads {', '.join(sorted(unread))}"


def test_a_field_that_is_only_checked_counts_as_unread():
    source = "class C:\n def __post_init__(self): self.checked\n def used(self): return self.used_too, config.used\n"
    assert set(fields_read(source)) == {"used_too", "used"}
