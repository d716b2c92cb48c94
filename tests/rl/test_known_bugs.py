"""Bugs that other trainers had: each check passes here and fails on a deliberately broken copy.

The table in docs/known_bugs.md names them.
"""

import math

import pytest
import torch

from verippo.rl import ppo

# two responses of 1 and 3 tokens behind one prompt token each
CU_SEQLENS = torch.tensor([0, 2, 6], dtype=torch.int32)
MASK = torch.tensor([0, 1, 0, 1, 1, 1]).bool()
SEQUENCES = (slice(0, 2), slice(2, 6))
VALUES = torch.tensor([9.0, 0.2, 9.0, 0.1, 0.4, 0.7])
RETURNS = torch.tensor([9.0, 1.0, 9.0, 0.0, 0.5, 1.0])


def whole_value_loss(values, returns, mask):
    return float(ppo.value_loss(values, values, returns, mask, clip=None).loss_sum) / 4


def summed_over_micro_batches(loss):
    """Losses of the two sequences as two micro-batches of one mini-batch of four tokens."""
    return sum(loss(VALUES[part], RETURNS[part], MASK[part]) for part in SEQUENCES)


def ours(values, returns, mask):
    return float(ppo.value_loss(values, values, returns, mask, clip=None).loss_sum) / 4


def normalised_by_micro_batch(values, returns, mask):
    loss = ppo.value_loss(values, values, returns, mask, clip=None)
    return float(loss.loss_sum / loss.num_tokens) / 2


@pytest.mark.parametrize(("loss", "is_right"), [(ours, True), (normalised_by_micro_batch, False)])
def test_critic_loss_is_normalised_by_mini_batch(loss, is_right):
    whole = whole_value_loss(VALUES, RETURNS, MASK)
    assert (summed_over_micro_batches(loss) == pytest.approx(whole)) is is_right


LOGPROBS = torch.tensor([0.0, -1.0, 0.0, -1.0, -2.0, -0.5])
REFERENCE = torch.tensor([0.0, -1.2, 0.0, -1.1, -1.0, -0.6])
SCORES = torch.tensor([1.0, 0.0])


def targets(kl_coef):
    rewards = ppo.token_rewards(
        SCORES, LOGPROBS, REFERENCE, MASK, CU_SEQLENS, kl_coef=kl_coef, estimator="k1"
    )
    return ppo.gae(rewards, torch.zeros(6), MASK, CU_SEQLENS, gamma=1.0, lam=1.0)[1]


@pytest.mark.parametrize(("kl_coef", "is_right"), [(0.5, True), (0.0, False)])
def test_critic_targets_hold_the_kl_penalty(kl_coef, is_right):
    """With lambda 1 a target is the score less the penalties that follow; 0 stands for none."""
    kl = LOGPROBS - REFERENCE
    expected = [1.0 - 0.5 * kl[1], *(-0.5 * kl[n:6].sum() for n in (3, 4, 5))]
    found = targets(kl_coef)[MASK].tolist()
    assert (found == pytest.approx([float(x) for x in expected])) is is_right


def loss_of(parts, *, mean_of_means):
    """Policy loss of a mini-batch in micro-batches."""
    sums = []
    for index in parts:
        loss = ppo.policy_loss(
            LOGPROBS[index], REFERENCE[index], RETURNS[index], MASK[index], clip_high=0.3
        )
        sums.append((float(loss.loss_sum), int(loss.num_tokens)))
    if mean_of_means:
        return sum(total / num for total, num in sums) / len(sums)
    return sum(total for total, _ in sums) / sum(num for _, num in sums)


@pytest.mark.parametrize(("mean_of_means", "is_right"), [(False, True), (True, False)])
def test_loss_does_not_depend_on_the_micro_batch_split(mean_of_means, is_right):
    everything = list(range(6))
    split = loss_of([everything[:2], everything[2:]], mean_of_means=mean_of_means)
    whole = loss_of([everything], mean_of_means=mean_of_means)
    assert (split == pytest.approx(whole)) is is_right


def test_whitening_does_not_depend_on_ranks():
    """Advantages are whitened before ranks share them out; whitened by rank they differ."""
    whole = ppo.whiten(RETURNS, MASK)
    by_rank = torch.cat([ppo.whiten(RETURNS[part], MASK[part]) for part in SEQUENCES])
    assert not torch.allclose(whole, by_rank)
    mean, var = RETURNS[MASK].mean(), RETURNS[MASK].var()
    given = [ppo.whiten(RETURNS[part], MASK[part], mean=mean, var=var) for part in SEQUENCES]
    assert torch.allclose(whole, torch.cat(given))


def shifted(values, mask):
    """A mask off by one: the state after each token in place of the state before it."""
    return torch.where(mask, values.roll(-1), 0.0)


@pytest.mark.parametrize(("broken", "is_right"), [(False, True), (True, False)])
def test_value_of_a_token_is_that_of_the_state_before_it(broken, is_right):
    """The one-step advantage of the last token is its reward less its own value."""
    values = torch.tensor([math.nan, 0.3, math.nan, 0.1, 0.2, 0.6])
    rewards = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    given = shifted(values.nan_to_num(), MASK) if broken else values
    advantages, _ = ppo.gae(rewards, given, MASK, CU_SEQLENS, gamma=1.0, lam=0.0)
    found = advantages[MASK].tolist()
    assert (found == pytest.approx([0.7, 0.1, 0.4, 0.4])) is is_right
