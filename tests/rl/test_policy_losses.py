"""GSPO, CISPO, KL as a loss, and score corrections, against values worked by hand and twins."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verippo.rl.ppo import cispo_loss, gspo_loss, kl_loss, noise_corrected, overlong_penalty

LN2 = math.log(2)
# two sequences of 4 and 3 tokens; the responses are tokens 1..3 and 5..6; garbage elsewhere
CU_SEQLENS = torch.tensor([0, 4, 7], dtype=torch.int32)
MASK = torch.tensor([0, 1, 1, 1, 0, 1, 1]).bool()
OLD = torch.tensor([math.nan, -1.0, -1.0, -1.0, math.inf, -2.0, -2.0])
# log ratios ln 2, ln 2, -2 ln 2 (mean 0, so s = 1) and ln 2, ln 2 (s = 2)
NEW = torch.tensor([math.inf, LN2 - 1, LN2 - 1, -2 * LN2 - 1, math.nan, LN2 - 2, LN2 - 2])
ADVANTAGES = torch.tensor([math.nan, 1.0, 1.0, 1.0, math.nan, 3.0, 3.0])


def leaf(x):
    return x.clone().requires_grad_()


def test_gspo_by_hand():
    new = leaf(NEW)
    loss = gspo_loss(new, OLD, ADVANTAGES, MASK, CU_SEQLENS, clip_low=0.2, clip_high=0.2)
    # first sequence: -1 x 1; second: clipped at 1.2, -1.2 x 3
    assert loss.loss_sum.item() == pytest.approx(-1 - 3.6)
    assert (loss.num_sequences.item(), loss.num_tokens.item()) == (2, 5)
    assert loss.clip_sum.item() == 2
    loss.loss_sum.backward()
    # each token of the first sequence: -A s / R = -1/3; none in the clipped one
    assert new.grad[MASK].tolist() == pytest.approx([-1 / 3] * 3 + [0.0, 0.0])
    assert new.grad[~MASK].tolist() == [0.0, 0.0]


def test_gspo_keeps_the_gradient_of_clipped_tokens_that_should_move_back():
    new = leaf(NEW)
    advantages = torch.where(MASK, -ADVANTAGES, ADVANTAGES)
    loss = gspo_loss(new, OLD, advantages, MASK, CU_SEQLENS, clip_low=0.2, clip_high=0.2)
    assert loss.loss_sum.item() == pytest.approx(1 + 6)  # -s A = 2 x 3 beats the clipped 3.6
    loss.loss_sum.backward()
    assert new.grad[MASK].tolist() == pytest.approx([1 / 3] * 3 + [3.0, 3.0])


def test_cispo_by_hand():
    new = leaf(NEW)
    loss = cispo_loss(new, OLD, ADVANTAGES, MASK, clip_low=0.5, clip_high=0.5)
    weights = [1.5, 1.5, 0.5, 1.5, 1.5]  # of ratios 2, 2, 1/4, 2, 2
    values = NEW[MASK].tolist()
    advantages = [1, 1, 1, 3, 3]
    expected = -sum(w * a * x for w, a, x in zip(weights, advantages, values, strict=True))
    assert loss.loss_sum.item() == pytest.approx(expected)
    assert loss.clip_sum.item() == 5
    loss.loss_sum.backward()
    grads = [-w * a for w, a in zip(weights, advantages, strict=True)]
    assert new.grad[MASK].tolist() == pytest.approx(grads)  # clipped tokens keep theirs
    assert new.grad[~MASK].tolist() == [0.0, 0.0]


def test_kl_loss_by_hand():
    new = leaf(NEW)
    reference = torch.where(MASK, NEW - 0.5, math.nan)
    loss = kl_loss(new, OLD, reference, MASK)
    assert loss.kl_sum.item() == pytest.approx(2.5)
    loss.loss_sum.backward()
    # rho times the log ratio to the reference
    assert new.grad[MASK].tolist() == pytest.approx([1.0, 1.0, 0.125, 1.0, 1.0])


def test_kl_loss_has_the_gradient_of_the_divergence():
    """Over the whole vocabulary, weighted by the old policy, it is that of KL(pi || pi_ref)."""
    torch.manual_seed(0)
    logits, old, reference = torch.randn(3, 6, dtype=torch.float64)
    current = leaf(logits)
    logp = current.log_softmax(-1)
    divergence = (logp.exp() * (logp - reference.log_softmax(-1))).sum()
    (expected,) = torch.autograd.grad(divergence, current)
    total = torch.zeros(6, dtype=torch.float64)
    for token in range(6):  # the expectation over samples of the old policy
        sampled = current.log_softmax(-1)[token : token + 1]
        loss = kl_loss(
            sampled,
            old.log_softmax(-1)[token : token + 1],
            reference.log_softmax(-1)[token : token + 1],
            torch.ones(1, dtype=torch.bool),
        ).loss_sum
        total += old.softmax(-1)[token] * torch.autograd.grad(loss, current)[0]
    assert torch.allclose(total, expected, atol=1e-12)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_gspo_equals_its_plain_twin_in_any_packing(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        new, old, advantage = torch.randn(3, length, generator=generator, dtype=torch.float64)
        rows.append((new * 0.3, old * 0.3, advantage))
    expected = 0.0
    for new, old, advantage in rows:
        s = math.exp(float((new - old).mean()))
        clipped = min(max(s, 0.9), 1.2)
        expected += sum(max(-s * a, -clipped * a) for a in advantage.tolist()) / len(new)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    joined = [torch.cat(parts) for parts in zip(*rows, strict=True)]
    mask = torch.ones(sum(lengths), dtype=torch.bool)
    loss = gspo_loss(*joined, mask, bounds, clip_low=0.1, clip_high=0.2)
    assert loss.loss_sum.item() == pytest.approx(expected, abs=1e-9)
    apart = sum(
        gspo_loss(
            *row,
            torch.ones(len(row[0]), dtype=torch.bool),
            torch.tensor([0, len(row[0])]),
            clip_low=0.1,
            clip_high=0.2,
        ).loss_sum.item()
        for row in rows
    )
    assert loss.loss_sum.item() == pytest.approx(apart, abs=1e-9)


def test_overlong_penalty_by_hand():
    lengths = torch.tensor([0, 60, 80, 90, 100, 130])
    penalty = overlong_penalty(lengths, limit=100, buffer=20)
    assert penalty.tolist() == pytest.approx([0.0, 0.0, 0.0, -0.5, -1.0, -1.0])
    with pytest.raises(ValueError, match="buffer=101: must lie in 1..limit=100"):
        overlong_penalty(lengths, limit=100, buffer=101)


def test_noise_corrected_scores_are_unbiased():
    rho0, rho1 = 0.1, 0.3
    accepted, rejected = noise_corrected(torch.tensor([1.0, 0.0]), rho0=rho0, rho1=rho1).tolist()
    assert rho0 * accepted + (1 - rho0) * rejected == pytest.approx(0.0, abs=1e-6)  # a wrong answer
    assert (1 - rho1) * accepted + rho1 * rejected == pytest.approx(1.0)  # a right one
    with pytest.raises(ValueError, match="together under 1"):
        noise_corrected(torch.zeros(1), rho0=0.5, rho1=0.5)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.2), (1.1, 0.2), (0.2, 0.0), (math.nan, 0.2)])
def test_bounds_out_of_range_are_refused(low, high):
    for loss in (
        lambda: cispo_loss(NEW, OLD, ADVANTAGES, MASK, clip_low=low, clip_high=high),
        lambda: gspo_loss(NEW, OLD, ADVANTAGES, MASK, CU_SEQLENS, clip_low=low, clip_high=high),
    ):
        with pytest.raises(ValueError, match="must lie in"):
            loss()
