"""Metrics worked by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from verippo.core.text.chat import render_response
from verippo.core.text.data import Problem
from verippo.core.training.engine import StepResult
from verippo.core.training.packing import pack
from verippo.rl import ppo
from verippo.rl.config import VerifierConfig
from verippo.rl.rollout import Rollout
from verippo.rl.step_metrics import UpdateMeter, evaluation_metrics, sample_row, step_metrics
from verippo.rl.verifier import FunctionVerifier


def a_rollout(text, *, prompt, logprobs, truncated=False, answer="Pneumonia"):
    return Rollout(
        problem=Problem(question="What is it?", answer=answer, index=0),
        prompt_ids=list(range(3, 3 + prompt)),
        response_ids=list(range(3, 3 + len(logprobs))),
        sampler_logprobs=logprobs,
        text=text,
        truncated=truncated,
    )


ROLLOUTS = [
    a_rollout(render_response("Because.", "pneumonia."), prompt=2, logprobs=[-1.0, -2.0, -3.0]),
    a_rollout("no format", prompt=1, logprobs=[-4.0], truncated=True),
]
SCORES = torch.tensor([1.0, 0.0], dtype=torch.float64)
#                          p    p    r    r    r    p    r        (prompt, response)
TOKENS = {
    "logprobs": [math.nan, math.nan, -1.5, -2.0, -2.9, math.nan, -3.0],
    "ref_logprobs": [math.nan, math.nan, -2.5, -2.0, -1.9, math.nan, -7.0],
    "entropy": [math.nan, math.nan, 1.0, 2.0, 3.0, math.nan, 2.0],
    "values": [math.nan, math.nan, 1.0, 2.0, 3.0, math.nan, 4.0],
    "returns": [math.nan, math.nan, 1.0, 2.0, 3.0, math.nan, 2.0],
    "rewards": [0.0, 0.0, 0.0, -0.5, 1.5, 0.0, -2.0],
}


def metrics(**changes):
    tensors = {name: torch.tensor(values) for name, values in TOKENS.items()}
    given = {
        "rollouts": ROLLOUTS,
        "scores": SCORES,
        "batch": pack(ROLLOUTS),
        "right_score": 1.0,
    } | tensors
    return step_metrics(**given | changes)


def test_a_steps_metrics_worked_by_hand():
    row = metrics()
    expected = {
        "score_mean": 0.5,
        "score_right_rate": 0.5,
        "score_unparsable_rate": 0.5,
        "exact_rate": 0.5,
        "reasoned_rate": 0.5,
        "response_length_mean": 2.0,
        "truncated_rate": 0.5,
        "kl_mean": (1.0 + 0.0 - 1.0 + 4.0) / 2,  # nats a response
        "reward_mean": (-0.5 + 1.5 - 2.0) / 2,
        "entropy": (1 + 2 + 3 + 2) / 4,
        # residuals return - value: 0 0 0 -2, mean -1/2, squares 3/4 + 9/4 = 3; returns 1 2 3 2,
        # mean 2, squares 2
        "explained_variance": 1 - 3 / 2,
        "sampler_logprob_gap_mean": (0.5 + 0.0 + 0.1 + 1.0) / 4,
        # between the third and fourth of 0, 0.1, 0.5, 1, at 0.99 * 3 = 2.97
        "sampler_logprob_gap_p99": 0.5 + 0.97 * 0.5,
        "tokens_generated": 4,
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, abs=1e-6), name
    assert 0 < row["peak_memory_gib"] < 1000


def test_means_are_over_tokens_not_over_responses():
    row = metrics(entropy=torch.tensor([0, 0, 1.0, 1.0, 1.0, 0, 5.0]))
    assert row["entropy"] == pytest.approx((1 + 1 + 1 + 5) / 4)  # a mean of means would give 3


def test_an_evaluations_metrics_worked_by_hand():
    row = evaluation_metrics(ROLLOUTS, SCORES, 1.0)
    for name, value in {
        "num": 2,
        "score_mean": 0.5,
        "right_rate": 0.5,
        "unparsable_rate": 0.5,
        "exact_rate": 0.5,
        "truncated_rate": 0.5,
    }.items():
        assert row[name] == value, name


@pytest.mark.parametrize("right", [1.0, 0.7])
def test_a_samples_verdict_and_the_right_rate_agree_on_what_is_right(right):
    """0.7 has no exact binary form: a score that went through fp32 would fall short of it."""
    verifier = VerifierConfig(kind="exact", right=right)
    scores = torch.tensor([right, 0.0], dtype=torch.float64)
    first, second = (
        sample_row(r, s, verifier, step=3, split="train")
        for r, s in zip(ROLLOUTS, scores.tolist(), strict=True)
    )
    assert first == {
        "step": 3,
        "split": "train",
        "prompt": "What is it?",
        "response": ROLLOUTS[0].text,
        "answer": "Pneumonia",
        "score": right,
        "verdict": "right",
    }
    assert second["verdict"] == "unparsable"
    assert sample_row(ROLLOUTS[0], 0.1, verifier, step=3, split="train")["verdict"] == "wrong"
    assert evaluation_metrics(ROLLOUTS, scores, right)["right_rate"] == 0.5


def test_a_verifier_that_needs_no_format_finds_nothing_unparsable():
    verifier = VerifierConfig(kind="function", function="m:f")
    options = {"needs_format": FunctionVerifier.needs_format}
    scores = torch.tensor([0.0, 1.0], dtype=torch.float64)  # the second has no format
    rows = [
        sample_row(r, s, verifier, step=1, split="train", **options)
        for r, s in zip(ROLLOUTS, scores.tolist(), strict=True)
    ]
    assert [row["verdict"] for row in rows] == ["wrong", "right"]
    assert metrics(scores=scores, **options)["score_unparsable_rate"] == 0
    assert evaluation_metrics(ROLLOUTS, scores, 1.0, **options)["unparsable_rate"] == 0


def test_a_sample_without_a_verdict_says_so():
    verifier = VerifierConfig(kind="judge")
    row = sample_row(ROLLOUTS[0], math.nan, verifier, step=1, split="train")
    assert (row["verdict"], row["score"]) == ("unjudged", None)


def losses(*, policy, clipped, kl, value, num, largest):
    zero = torch.zeros(())
    numbers = [torch.tensor(x) for x in (policy, num, clipped, 0, kl, largest)]
    pg = ppo.PolicyLoss(*numbers, masked_sum=torch.tensor(clipped + 1))
    return pg, ppo.ValueLoss(torch.tensor(value), torch.tensor(num), zero)


def add(meter, first_minibatch, **numbers):
    pg, vf = losses(**numbers)
    meter.add_policy(pg, first_minibatch=first_minibatch)
    meter.add_critic(vf)


def test_an_updates_means_are_over_the_tokens_of_all_its_micro_batches():
    meter = UpdateMeter()
    add(meter, True, policy=3.0, clipped=1, kl=0.5, value=8.0, num=2, largest=1e-7)
    add(meter, True, policy=1.0, clipped=0, kl=0.0, value=0.0, num=0, largest=0.0)
    assert meter.take_approx_kl() == pytest.approx(0.25)
    add(meter, False, policy=-1.0, clipped=2, kl=0.25, value=1.0, num=6, largest=0.5)
    assert meter.take_approx_kl() == pytest.approx(0.25 / 6)
    meter.policy_results += [StepResult(True, 2.0), StepResult(False, math.nan)]
    meter.critic_results += [StepResult(True, 10.0), StepResult(True, 20.0)]
    row = meter.result()
    expected = {
        "policy_loss": 3 / 8,
        "clip_fraction": 3 / 8,
        "dual_clip_fraction": 0.0,
        "ratio_masked_fraction": (2 + 1 + 3) / 8,
        "approx_kl": 0.75 / 8,
        "value_loss": 9 / 8,
        "ratio_first_minibatch_max": 1e-7,  # later mini-batches have moved on
        "grad_norm_policy": 2.0,  # the skipped step has none
        "grad_norm_value": 15.0,
    }
    assert row.keys() == expected.keys()
    for name, value in expected.items():
        assert row[name] == pytest.approx(value), name


def test_when_every_step_was_skipped_there_is_no_gradient_norm():
    meter = UpdateMeter()
    add(meter, True, policy=3.0, clipped=1, kl=0.5, value=8.0, num=2, largest=0.0)
    meter.policy_results.append(StepResult(False, math.nan))
    meter.critic_results.append(StepResult(False, math.nan))
    row = meter.result()
    assert math.isnan(row["grad_norm_policy"])
    assert math.isnan(row["grad_norm_value"])


def test_quarters_of_responses_by_hand():
    """Responses of 4 and 2 tokens: quarters (0)(1)(2)(3), and 0 and 2 of the shorter one."""
    from verippo.rl.step_metrics import quarter_metrics

    rows = [
        SimpleNamespace(prompt_ids=[1, 1, 1], response_ids=[2] * 4),
        SimpleNamespace(prompt_ids=[1], response_ids=[2] * 2),
    ]
    batch = pack(rows)
    values = torch.full((batch.num_tokens,), math.nan)
    values[batch.response_mask] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    returns = torch.where(batch.response_mask, values + 1, math.nan)
    row = quarter_metrics(values, 10 * values, returns, batch)
    means = [row[f"value_mean_q{n}"] for n in (1, 2, 3, 4)]
    assert means == [3.0, 2.0, 4.5, 4.0]  # (1 + 5) / 2, 2, (3 + 6) / 2, 4
    assert [row[f"advantage_mean_q{n}"] for n in (1, 2, 3, 4)] == [10 * mean for mean in means]
    assert row["explained_variance_q1"] == pytest.approx(1.0)  # off by a constant
    assert row["explained_variance_q2"] == 0.0  # a single token
