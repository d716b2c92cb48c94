"""GSPO, CISPO, KL as a loss, and score corrections, against values worked by hand and twins."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verippo.kernels.logprob import linear_logprobs
from verippo.rl.ppo import (
    cispo_loss,
    entropy_loss,
    gspo_loss,
    kl_estimate,
    kl_loss,
    noise_corrected,
    overlong_penalty,
    ratio_mask,
)

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


@pytest.mark.parametrize("old_is_current", [True, False])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_differentiated_estimators_have_other_gradients(estimator, old_is_current):
    """Why they are not offered as losses: only k2 gives KL(pi || pi_ref)'s, and on-policy only."""
    torch.manual_seed(0)
    logits, old, reference = torch.randn(3, 6, dtype=torch.float64)
    current = leaf(logits)
    weights = (logits if old_is_current else old).softmax(-1)  # of the policy that sampled
    logp, ref = current.log_softmax(-1), reference.log_softmax(-1)
    (right,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), current, retain_graph=True)
    (forward,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), current, retain_graph=True)
    loss = (weights * kl_estimate(logp, ref, estimator=estimator)).sum()
    (found,) = torch.autograd.grad(loss, current)
    assert torch.allclose(found, right, atol=1e-12) is (estimator == "k2" and old_is_current)
    if old_is_current:
        expected = {"k1": torch.zeros(6).double(), "k2": right, "k3": forward}[estimator]
        assert torch.allclose(found, expected, atol=1e-12)


def test_entropy_loss_by_hand():
    entropy = leaf(torch.tensor([math.nan, 0.5, 2.0, 0.0, math.inf, 1.0, 0.25]))
    loss = entropy_loss(entropy, MASK)
    assert (loss.loss_sum.item(), loss.num_tokens.item()) == (-3.75, 5)
    loss.loss_sum.backward()
    assert entropy.grad.tolist() == [0.0, -1.0, -1.0, -1.0, 0.0, -1.0, -1.0]


@given(
    st.integers(1, 9), st.integers(2, 7), st.sampled_from([0.5, 1.0, 1.7]), st.integers(0, 2**31)
)
@settings(max_examples=30, deadline=None)
def test_gradient_of_the_entropy_equals_plain_torchs(num, vocabulary, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(num, generator=generator) < 0.7
    gradients = []
    for dense in (False, True):
        h, w = leaf(hidden), leaf(weight)
        if dense:
            p = (h @ w.t() / temperature).softmax(-1)
            loss = (p * p.log()).sum(-1)[mask].sum()
        else:
            targets = torch.zeros(num, dtype=torch.int64)
            entropy = linear_logprobs(
                h, w, targets, temperature=temperature, with_entropy=True, chunk_tokens=2
            ).entropy
            loss = entropy_loss(entropy, mask).loss_sum
        gradients.append(torch.autograd.grad(loss, (h, w)))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_ratio_mask_by_hand():
    # ratios 2, 2, 1/4 and 2, 2; bounds belong to the inside
    found = ratio_mask(NEW, OLD, MASK, low=0.25, high=1.5)
    assert found.outside[MASK].tolist() == [True, True, False, True, True]
    assert found.num_outside.item() == 4
    assert not found.outside[~MASK].any()
    found = ratio_mask(NEW, OLD, MASK, low=0.26, high=math.inf)
    assert found.outside[MASK].tolist() == [False, False, True, False, False]
    assert ratio_mask(OLD, OLD, MASK, low=0.99, high=1.01).num_outside.item() == 0


@given(st.integers(1, 12), st.floats(0, 0.99), st.floats(1.01, 5), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_ratio_mask_equals_its_plain_twin(num, low, high, seed):
    generator = torch.Generator().manual_seed(seed)
    new, old = torch.randn(2, num, generator=generator, dtype=torch.float64)
    mask = torch.rand(num, generator=generator) < 0.7
    expected = [
        bool(on) and not low <= math.exp(a - b) <= high
        for on, a, b in zip(mask, new.tolist(), old.tolist(), strict=True)
    ]
    garbage = torch.where(mask, new, math.nan)
    found = ratio_mask(garbage, old, mask, low=low, high=high)
    assert found.outside.tolist() == expected
    assert found.num_outside.item() == sum(expected)


@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (-0.1, 2.0), (0.5, 1.0), (0.5, math.nan)])
def test_ratio_mask_must_hold_the_unmoved_policy(low, high):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), high=.* be over 1"):
        ratio_mask(NEW, OLD, MASK, low=low, high=high)


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
