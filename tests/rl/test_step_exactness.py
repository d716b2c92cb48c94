"""The same data gives the same update whatever the packing, the micro-batch size, the order and the
number of ranks.

The twin is plain transformers: one padded sequence at a time, eager attention, dense log-softmax, the formulas written out.
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

PAD = 4


@pytest.fixture(scope="module")
def twin(rank_checks, job):
    """What each of rank_checks.UPDATES should lead to."""
    return list(twin_updates(rank_checks, job, max_grad_norm=math.inf))


@pytest.fixture(params=["one_rank", "both_ranks"])
def results(request):
    return request.getfixturevalue(request.param)


def twin_updates(rank_checks, job, *, max_grad_norm):
    policy = AutoModelForCausalLM.from_pretrained(job["policy"], attn_implementation="eager")
    critic = AutoModelForSequenceClassification.from_pretrained(
        job["critic"], attn_implementation="eager", num_labels=1
    )
    for what in rank_checks.UPDATES:
        if not what.poisoned:
            losses = [
                twin_losses(rank_checks, job["experience"], s, policy, critic) for s in what.seqs
            ]
            num_tokens = sum(num for _, _, num in losses)
            norms = [
                plain_sgd(
                    model,
                    sum(loss[part] for loss in losses) / num_tokens,
                    rank_checks.RATE,
                    max_grad_norm,
                )
                for part, model in enumerate((policy, critic))
            ]
        else:
            norms = [math.nan, math.nan]
        yield {
            "weights": {
                name: {key: p.detach().clone() for key, p in model.named_parameters()}
                for name, model in (("policy", policy), ("critic", critic))
            },
            "norms": norms,
        }


def twin_losses(rank_checks, experience, seq, policy, critic):
    """Loss sums of policy and critic over one sequence, and its number of response tokens."""
    start, end = experience.batch.cu_seqlens[seq : seq + 2].tolist()
    prompt, response = rank_checks.LENGTHS[seq]
    assert end - start == prompt + response
    ids = torch.cat([experience.batch.tokens[start:end], torch.zeros(PAD, dtype=torch.int64)])[None]
    attention_mask = torch.tensor([[1] * (prompt + response) + [0] * PAD])
    before = slice(
        prompt - 1, prompt + response - 1
    )  # the states from which the response tokens are drawn
    old_logprob, old_value, advantage, target = (
        x[start + prompt : end]
        for x in (experience.logprobs, experience.values, experience.advantages, experience.returns)
    )

    logits = (
        policy(input_ids=ids, attention_mask=attention_mask).logits[0, before]
        / rank_checks.TEMPERATURE
    )
    logprob = torch.log_softmax(logits, -1)[
        torch.arange(response), ids[0, prompt : prompt + response]
    ]
    ratio = torch.exp(logprob - old_logprob)
    low, high = 1 - rank_checks.CLIPS["clip_low"], 1 + rank_checks.CLIPS["clip_high"]
    policy_loss = -torch.minimum(advantage * ratio, advantage * ratio.clip(low, high)).sum()

    hidden = critic.model(input_ids=ids, attention_mask=attention_mask).last_hidden_state[0, before]
    value = hidden @ critic.score.weight[0]
    clipped = old_value + (value - old_value).clip(-rank_checks.VALUE_CLIP, rank_checks.VALUE_CLIP)
    value_loss = 0.5 * torch.maximum((value - target) ** 2, (clipped - target) ** 2).sum()
    return policy_loss, value_loss, response


def plain_sgd(model, loss, rate, max_grad_norm):
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= rate * min(1.0, max_grad_norm / norm) * gradient
    return norm


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_update_is_plain_torchs_whatever_the_packing_the_micro_batches_the_order_and_the_ranks(
    rank_checks, results, twin, stage
):
    trail = results[0]["updates"][stage]
    for number, expected in enumerate(twin):
        for name, weights in expected["weights"].items():
            assert largest_difference(trail[number + 1]["weights"][name], weights) < 1e-6, (
                number,
                name,
            )
        for step, norm in zip(trail[number + 1]["steps"], expected["norms"], strict=True):
            assert step == pytest.approx((not math.isnan(norm), norm), rel=1e-4, nan_ok=True)


def test_the_twins_updates_move_the_weights_far_more_than_the_tolerance(job, twin, one_rank):
    before = one_rank[0]["updates"][0][0]["weights"]
    for name in ("policy", "critic"):
        moved = largest_difference(twin[0]["weights"][name], before[name])
        assert moved > 1e-3, moved
        assert largest_difference(twin[1]["weights"][name], twin[0]["weights"][name]) > 1e-3


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_gradient_that_is_not_finite_on_one_rank_moves_no_weight_of_any(
    results, rank_checks, stage
):
    number = next(n for n, what in enumerate(rank_checks.UPDATES) if what.poisoned)
    for rank in results:
        assert [applied for applied, _ in rank["updates"][stage][number + 1]["steps"]] == [
            False,
            False,
        ]
    before, after = (results[0]["updates"][stage][n]["weights"] for n in (number, number + 1))
    for name in ("policy", "critic"):
        assert largest_difference(before[name], after[name]) == 0.0


@pytest.mark.parametrize("stage", [0, 3])
def test_conversation_gives_the_update_of_its_turns_packed_one_by_one(results, one_rank, stage):
    runs = results[0]["conversations"][stage]
    for name in ("policy", "critic"):
        assert largest_difference(runs["whole"][name], runs["before"][name]) > 1e-3
        assert largest_difference(runs["whole"][name], runs["split"][name]) < 1e-6
        alone = one_rank[0]["conversations"][0]["whole"][name]
        assert largest_difference(runs["whole"][name], alone) < 1e-6
    for whole, split in zip(runs["whole steps"], runs["split steps"], strict=True):
        assert whole == pytest.approx(split, rel=1e-4)
        assert whole[0]
