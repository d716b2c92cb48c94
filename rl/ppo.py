"""The formulas of PPO on packed tokens: rewards, advantages, whitening, losses.

Index i of every [tokens] tensor refers to tokens[i]. A mask, boolean or integer, marks the
response tokens. Everything off the mask is selected away before any arithmetic, so that NaN there
changes neither results nor gradients. Results are fp32 (float64 for float64 inputs); log-probs and
KL divergences are in nats. Losses are sums over the mask: the caller divides by the response
tokens of the whole mini-batch, over all its micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.gae import discounted_suffix_sums

# all formulas can be imported from here
from .corrections import adaptive_lambda, sampler_correction  # noqa: F401
from .normalisation import group_advantages, whiten  # noqa: F401
from .policy_losses import (  # noqa: F401
    cispo_loss,
    entropy_loss,
    gspo_loss,
    kl_loss,
    noise_corrected,
    overlong_penalty,
    ratio_mask,
)
from .token_masks import (
    LOG_RATIO_LIMIT,
    as_float,
    check_mask,
    check_shapes,
    continues,
    response_tokens,
    select,
)


class PolicyLoss(NamedTuple):
    """Result of `policy_loss`: scalars, of which only `loss_sum` has a gradient."""

    loss_sum: Tensor
    """Summed loss; divide by the number of tokens of the mini-batch."""
    num_tokens: Tensor
    """Number of response tokens."""
    clip_sum: Tensor
    """Number of tokens without gradient because the clipped branch is larger."""
    dual_clip_sum: Tensor
    """Number of tokens without gradient because of `dual_clip`."""
    approx_kl_sum: Tensor
    """Summed estimate of KL(old policy || policy) in nats."""
    ratio_max_abs_log: Tensor
    """Largest |log rho| before the clamp, in nats; 0 without tokens."""
    masked_sum: Tensor = torch.zeros(())
    """Number of tokens without gradient because of `ratio_mask`, which is applied outside."""


class ValueLoss(NamedTuple):
    """Result of `value_loss`: scalars, of which only `loss_sum` has a gradient."""

    loss_sum: Tensor
    """Summed loss; divide by the number of tokens of the mini-batch."""
    num_tokens: Tensor
    """Number of response tokens."""
    clip_sum: Tensor
    """Number of tokens without gradient because the clipped error is larger."""


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str) -> Tensor:
    """Estimates KL(policy || reference) at tokens sampled from the policy.

        l = logprobs - ref_logprobs
        k1 = l        k2 = l^2 / 2        k3 = exp(-l) - 1 + l

    k1 and k3 are unbiased; k2 and k3 are never negative. k3 clamps -l to +-20 before exp.

    Args:
        logprobs: [n], of the policy.
        ref_logprobs: [n], of the reference.
        estimator: "k1", "k2" or "k3".

    Returns:
        [n] in nats, differentiable.

    Raises:
        ValueError: another estimator, or shapes that differ.

    Source: http://joschu.net/blog/kl-approx.html
    """
    check_shapes(logprobs, ref_logprobs=ref_logprobs)
    log_ratio = as_float(logprobs) - as_float(ref_logprobs)
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return torch.expm1((-log_ratio).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)) + log_ratio
    raise ValueError(f"estimator is {estimator!r}, must be 'k1', 'k2' or 'k3'")


@torch.no_grad()
def token_rewards(
    scores: Tensor | Sequence[float],
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    response_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
) -> Tensor:
    """Reward of each response token: the KL penalty, and the score on the last one.

        reward_t = -kl_coef * kl_t + [t is the last response token of its sequence] * score

    Args:
        scores: [seqs], the verifier's scores.
        logprobs: [tokens], of the policy that sampled.
        ref_logprobs: [tokens], of the reference; not read, and may be None, if kl_coef is 0.
        response_mask: [tokens].
        cu_seqlens: [seqs + 1], boundaries of the packed sequences.
        kl_coef: reward subtracted per nat of KL divergence.
        estimator: as for `kl_estimate`.

    Returns:
        [tokens], 0 off the mask, without gradient.

    Raises:
        ValueError: shapes disagree, kl_coef is negative, or a sequence without response token has
            a score other than 0.

    Source: arXiv 2203.02155, eq. 2.
    """
    index, segment, num_seqs = response_tokens(logprobs, response_mask, cu_seqlens)
    score = torch.as_tensor(scores, dtype=as_float(logprobs).dtype, device=logprobs.device)
    if score.shape != (num_seqs,):
        raise ValueError(
            f"scores has shape {list(score.shape)}, must be [{num_seqs}], one for each sequence"
        )
    lost = (torch.bincount(segment, minlength=num_seqs) == 0) & (score != 0)
    if bool(lost.any()):
        i = int(lost.nonzero()[0])
        raise ValueError(
            f"sequence {i} has no response token to take its score {float(score[i])}: "
            "drop it, or score 0"
        )
    if not kl_coef >= 0 or (kl_coef > 0 and ref_logprobs is None):
        raise ValueError(f"kl_coef is {kl_coef}, must be at least 0, and 0 without ref_logprobs")
    rewards = torch.zeros_like(logprobs, dtype=score.dtype)
    if ref_logprobs is not None and kl_coef > 0:
        check_shapes(logprobs, ref_logprobs=ref_logprobs)
        kl = kl_estimate(logprobs[index], ref_logprobs[index], estimator=estimator)
        rewards[index] = (-kl_coef * kl).to(rewards.dtype)
    last = ~continues(segment)
    rewards[index[last]] += score[segment[last]]
    return rewards


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    lam_critic: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the response tokens of each packed sequence.

        delta_t  = r_t + gamma V_{t+1} - V_t
        A_t      = delta_t + gamma lam A_{t+1}
        return_t = A_t + V_t      with A of lam_critic, if it is given

    t+1 is the next response token of the sequence, across gaps in the mask such as tool output;
    V and A are 0 beyond the last one.

    Args:
        rewards: [tokens], reward of each token.
        values: [tokens], critic's value of the state before each token.
        response_mask: [tokens]; rewards and values are read only where it is set.
        cu_seqlens: [seqs + 1], boundaries of the packed sequences.
        gamma: discount factor, in 0..1.
        lam: decay of the trace in 0..1, a number or [seqs].
        lam_critic: decay for the returns, likewise; None: `lam`.

    Returns:
        advantages, returns: [tokens] each, not whitened, 0 off the mask, without gradient.

    Raises:
        ValueError: shapes disagree, or gamma or a lambda lies outside 0..1.

    Source: arXiv 1506.02438, eq. 16; lam by sequence as in arXiv 2504.05118; lam_critic as in
    arXiv 2503.01491, section 4.2.
    """
    index, segment, num_seqs = response_tokens(rewards, response_mask, cu_seqlens)
    check_shapes(rewards, values=values)
    reward = as_float(rewards[index])
    value = as_float(values[index])
    more = continues(segment)
    next_value = torch.where(more, value.roll(-1), 0.0)  # more[-1] is False
    delta = reward + gamma * next_value - value
    trace = partial(_trace, delta, segment, num_seqs, gamma)
    advantage = trace(lam)
    returns = value + (advantage if lam_critic is None else trace(lam_critic))
    nothing = torch.zeros_like(rewards, dtype=delta.dtype)
    return nothing.index_copy(0, index, advantage), nothing.index_copy(0, index, returns)


def _trace(
    delta: Tensor,
    segment: Tensor,
    num_seqs: int,
    gamma: float,
    lam: float | Tensor,
) -> Tensor:
    """The sums of `delta` discounted by gamma lam, along each sequence."""
    lam_of = torch.as_tensor(lam, dtype=delta.dtype, device=delta.device)
    within = 0 <= gamma <= 1 and bool(((lam_of >= 0) & (lam_of <= 1)).all())
    if lam_of.shape not in ((), (num_seqs,)) or not within:
        raise ValueError(
            f"gamma={gamma} and lam={lam} must lie in 0..1, and lam must be a number or of shape "
            f"[{num_seqs}]"
        )
    decay = torch.where(continues(segment), gamma * lam_of.expand(num_seqs)[segment], 0.0)
    longest = int(torch.bincount(segment).max()) if len(segment) > 0 else 0
    return discounted_suffix_sums(delta, decay.to(delta.dtype), max_length=longest)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    importance: Tensor | None = None,
) -> PolicyLoss:
    """Clipped surrogate loss of PPO, with separate lower and upper bounds.

        rho  = exp(clamp(logprobs - old_logprobs, -20, 20))
        loss = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))
        loss = min(loss, -dual_clip A)  where A < 0, if dual_clip is given

    Args:
        logprobs: [tokens], of the policy being trained; the only input with a gradient.
        old_logprobs: [tokens], of the policy that sampled, by the trainer's own forward pass.
        advantages: [tokens].
        mask: [tokens], response tokens.
        clip_low: in (0, 1].
        clip_high: above 0.
        dual_clip: above 1; None: no such bound.
        importance: [tokens], weights that multiply each token's loss; None: 1.

    Returns:
        Sums over the mask. `approx_kl_sum` adds up rho - 1 - log rho.

    Raises:
        ValueError: shapes disagree, or a bound is out of range.

    Source: arXiv 1707.06347, eq. 7; arXiv 2503.14476, section 3.1; arXiv 1912.09729, eq. 5.
    """
    mask = check_mask(logprobs, mask)
    check_shapes(logprobs, old_logprobs=old_logprobs, advantages=advantages)
    if not (0 < clip_low <= 1 and clip_high > 0):
        raise ValueError(f"clip_low={clip_low} must lie in (0, 1], clip_high={clip_high} be over 0")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}, must be over 1: None turns it off")
    advantage = select(advantages.detach(), mask)
    log_ratio = select(logprobs, mask) - select(old_logprobs.detach(), mask)
    largest = log_ratio.detach().abs().max() if len(mask) > 0 else log_ratio.new_zeros(())
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, clipped)
    held = torch.zeros_like(mask)
    if dual_clip is not None:
        held = (advantage < 0) & (loss > -dual_clip * advantage)
        loss = torch.where(held, -dual_clip * advantage, loss)
    if importance is not None:
        check_shapes(logprobs, importance=importance)
        loss = loss * select(importance.detach(), mask)
    approx_kl = torch.expm1(log_ratio.detach()) - log_ratio.detach()
    return PolicyLoss(
        loss.sum(), mask.sum(), (clipped > plain).sum(), held.sum(), approx_kl.sum(), largest
    )


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
) -> ValueLoss:
    """Half the squared error of the critic, with clipped movement from the old values.

        loss = 0.5 max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2)

    Args:
        values: [tokens], of the critic being trained; the only input with a gradient.
        old_values: [tokens], of the critic before the update.
        returns: [tokens], its targets R.
        mask: [tokens], response tokens.
        clip: distance that a value may move, above 0; None: 0.5 (V - R)^2.

    Returns:
        Sums over the mask.

    Raises:
        ValueError: shapes disagree, or clip is not above 0.

    Source: arXiv 2005.12729, "value function clipping".
    """
    mask = check_mask(values, mask)
    check_shapes(values, old_values=old_values, returns=returns)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}, must be over 0: None turns it off")
    value = select(values, mask)
    target = select(returns.detach(), mask)
    error = (value - target).square()
    held = torch.zeros_like(mask)
    if clip is not None:
        old = select(old_values.detach(), mask)
        clipped_error = (value.clamp(old - clip, old + clip) - target).square()
        held = clipped_error > error
        error = torch.maximum(error, clipped_error)
    return ValueLoss(0.5 * error.sum(), mask.sum(), held.sum())
