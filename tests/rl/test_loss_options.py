"""Options of the policy loss and the critic: each changes the update as its formula says."""

import math
from types import SimpleNamespace

import pytest
import torch

from verippo.core.text.data import Problem
from verippo.core.training.packing import pack
from verippo.rl.advantages import (
    length_penalties,
    loss_divisor,
    loss_weights,
    policy_loss_function,
)
from verippo.rl.config import CorrectionConfig, KLConfig, PPOConfig
from verippo.rl.experience import Experience
from verippo.rl.rollout import Rollout

LN2 = math.log(2)


def config(**options):
    base = {
        "data": "d.json",
        "output": "out",
        "policy": "m",
        "steps": 4,
        "verifier": {"kind": "exact"},
        "dtype": "fp32",
    }
    from verippo.rl.config import VerifierConfig

    base["verifier"] = VerifierConfig(kind="exact")
    return PPOConfig(**{**base, **options})


def rollouts():
    """Two responses of 2 and 4 tokens; the sampler's log-probs are ln 2 too high on the first."""
    return [
        Rollout(
            problem=Problem(question="?", answer="!", index=0),
            text="",
            prompt_ids=[1, 2],
            response_ids=[3] * num,
            sampler_logprobs=[gap - 1.0] * num,
            truncated=num == 4,
        )
        for num, gap in ((2, LN2), (4, 0.0))
    ]


def weights_of(**options):
    rows = rollouts()
    batch = pack(rows)
    logprobs = torch.full((batch.num_tokens,), -1.0)
    weights, metrics = loss_weights(config(**options), logprobs, batch, rows)
    assert not weights[~batch.response_mask].any()
    return weights[batch.response_mask].tolist(), metrics


def test_without_options_every_token_counts_once():
    assert weights_of() == ([1.0] * 6, {})


def test_correction_weights_the_tokens_and_is_measured():
    weights, metrics = weights_of(correction=CorrectionConfig(level="token", mode="truncate"))
    assert weights == pytest.approx([0.5, 0.5, 1, 1, 1, 1])
    # (sum u)^2 / (n sum u^2) = 25 / (6 x 4.5)
    assert metrics == pytest.approx(
        {"correction_touched_rate": 0.0, "correction_sample_size": 25 / 27}
    )
    masked = CorrectionConfig(level="sequence", mode="mask", low=0.5, high=2.0)
    weights, metrics = weights_of(correction=masked)
    assert weights == pytest.approx([0, 0, 1, 1, 1, 1])  # the product over two tokens is 1/4
    assert metrics["correction_touched_rate"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("options", "weights", "divisor"),
    [
        ({}, [1.0] * 6, 6),
        ({"loss_mean": "sequence"}, [0.5, 0.5, 0.25, 0.25, 0.25, 0.25], 2),
        ({"policy_loss": "gspo"}, [1.0] * 6, 2),
        ({"loss_mean": "fixed"}, [1.0] * 6, 2048),
    ],
)
def test_loss_is_a_mean_over_tokens_sequences_or_a_fixed_number(options, weights, divisor):
    assert weights_of(**options)[0] == pytest.approx(weights)
    batch = pack(rollouts())
    zeros = torch.zeros(batch.num_tokens)
    experience = Experience(
        batch=batch,
        logprobs=zeros,
        values=zeros,
        advantages=zeros,
        returns=zeros,
        ref_logprobs=zeros,
        rewards=zeros,
    )
    (mini,) = experience.minibatches(1, seed=(0,))
    assert loss_divisor(config(**options), mini) == divisor


def test_penalties_of_long_responses():
    options = {"missing_eos_penalty": 0.5}
    assert length_penalties(config(**options), rollouts()).tolist() == [0.0, -0.5]
    from verippo.core.sampling.sampler import SamplingParams

    options = {"overlong_buffer": 2, "sampling": SamplingParams(max_new_tokens=5)}
    assert length_penalties(config(**options), rollouts()).tolist() == [0.0, -0.5]


def test_kl_as_a_loss_adds_its_gradient():
    micro = SimpleNamespace(
        logprobs=torch.tensor([-1.0, -2.0]),
        ref_logprobs=torch.tensor([-1.5, -2.0]),
        advantages=torch.zeros(2),
        mask=torch.ones(2, dtype=torch.bool),
        kl_coef=0.1,
    )
    logprobs = micro.logprobs.clone().requires_grad_()
    loss = policy_loss_function(config(kl=KLConfig(place="loss")))(logprobs, micro)
    loss.loss_sum.backward()
    assert logprobs.grad.tolist() == pytest.approx([0.05, 0.0])


def a_micro(**changes):
    """Ratios 1, 2, 1/4 and garbage off the mask; advantages of both signs."""
    fields = {
        "logprobs": torch.tensor([-1.0, -1.0, -1.0, math.nan]).double(),
        "ref_logprobs": torch.full((4,), -1.5).double(),
        "advantages": torch.tensor([1.0, -3.0, 2.0, math.nan]).double(),
        "mask": torch.tensor([True, True, True, False]),
        "batch": SimpleNamespace(cu_seqlens=torch.tensor([0, 4])),
        "kl_coef": 0.1,
    }
    return SimpleNamespace(**fields | changes)


def new_logprobs():
    return torch.tensor([-1.0, LN2 - 1, -2 * LN2 - 1, math.nan]).double().requires_grad_()


def gradient_of(logprobs, loss):
    loss.loss_sum.backward()
    return logprobs.grad.tolist()


def test_ratio_mask_stops_the_gradient_on_both_sides():
    """PPO's clip would keep that of ratio 2 with A < 0 and that of 1/4 with A > 0."""
    kept = new_logprobs()
    loss = policy_loss_function(config())(kept, a_micro())
    assert gradient_of(kept, loss) == pytest.approx([-1.0, 6.0, -0.5, 0.0])
    assert loss.masked_sum.item() == 0
    held = new_logprobs()
    masked = policy_loss_function(config(ratio_mask_low=0.5, ratio_mask_high=1.5))(held, a_micro())
    assert gradient_of(held, masked) == pytest.approx([-1.0, 0.0, 0.0, 0.0])
    assert masked.masked_sum.item() == 2
    assert masked.loss_sum.item() == loss.loss_sum.item()
    low_alone = new_logprobs()
    loss = policy_loss_function(config(ratio_mask_low=0.5))(low_alone, a_micro())
    assert gradient_of(low_alone, loss) == pytest.approx([-1.0, 6.0, 0.0, 0.0])


@pytest.mark.parametrize(
    "options",
    [{"policy_loss": "gspo"}, {"policy_loss": "cispo"}, {"kl": KLConfig(place="loss")}],
)
def test_ratio_mask_holds_for_every_loss(options):
    logprobs = new_logprobs()
    options |= {"ratio_mask_low": 0.5, "ratio_mask_high": 1.5}
    found = gradient_of(logprobs, policy_loss_function(config(**options))(logprobs, a_micro()))
    assert found[0] != 0
    assert found[1:] == [0.0, 0.0, 0.0]


def test_entropy_bonus_is_part_of_the_loss():
    logprobs = new_logprobs()
    entropy = torch.tensor([0.5, 1.5, 2.0, math.nan]).double().requires_grad_()
    plain = policy_loss_function(config())(logprobs, a_micro())
    loss = policy_loss_function(config(entropy_coef=0.01))((logprobs, entropy), a_micro())
    assert (loss.loss_sum - plain.loss_sum).item() == pytest.approx(-0.04)
    loss.loss_sum.backward()
    assert entropy.grad.tolist() == pytest.approx([-0.01, -0.01, -0.01, 0.0])
    assert logprobs.grad.tolist() == pytest.approx([-1.0, 6.0, -0.5, 0.0])


def test_entropy_bonus_does_not_depend_on_the_packing():
    function = policy_loss_function(config(entropy_coef=0.5))
    logprobs = new_logprobs()
    entropy = torch.tensor([0.5, 1.5, 2.0, math.nan]).double()
    micro = a_micro()
    whole = function((logprobs, entropy), micro).loss_sum
    parts = 0.0
    for part in (slice(0, 1), slice(1, 4)):
        tensors = ("logprobs", "ref_logprobs", "advantages", "mask")
        own = a_micro(**{name: getattr(micro, name)[part] for name in tensors})
        parts = parts + function((logprobs[part], entropy[part]), own).loss_sum
    assert whole.item() == pytest.approx(parts.item())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"policy_loss": "gspo", "loss_mean": "token"}, "policy_loss=gspo is a mean over"),
        ({"kl": KLConfig(place="loss"), "loss_mean": "sequence"}, "needs loss_mean=token"),
        ({"entropy_coef": 0.1, "loss_mean": "fixed"}, "entropy_coef=0.1 needs loss_mean=token"),
        ({"entropy_coef": 0.1, "policy_loss": "gspo"}, "entropy_coef=0.1 needs loss_mean=token"),
        ({"ratio_mask_low": 1.0}, "ratio_mask_low=1.0: must be 0 or more and under 1"),
        ({"ratio_mask_high": 1.0}, "ratio_mask_high=1.0: must be above 1"),
        ({"overlong_buffer": 5000}, "overlong_buffer=5000 is over"),
        ({"critic_warmup_steps": 4}, "leaves no step of 4 to train the policy"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        config(**options)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_estimators_are_no_losses(estimator):
    reason = rf"kl.estimator={estimator}: .* wrong once the policy has moved: leave it at k1"
    with pytest.raises(ValueError, match=reason):
        KLConfig(place="loss", estimator=estimator)
