"""Policy losses other than PPO's, what is added to them, and corrections of scores.

Conventions are those of `rl.ppo`: [tokens] tensors, sums over the mask, nothing off it is read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .token_masks import (
    LOG_RATIO_LIMIT,
    as_float,
    check_mask,
    check_shapes,
    response_tokens,
    select,
)


class SequenceLoss(NamedTuple):
    """Result of `gspo_loss`: scalars, of which only `loss_sum` has a gradient."""

    loss_sum: Tensor
    """Sum over sequences of the mean loss of their tokens; divide by the number of sequences."""
    num_sequences: Tensor
    """Number of sequences with a response token."""
    num_tokens: Tensor
    """Number of response tokens."""
    clip_sum: Tensor
    """Number of tokens without gradient because the clipped branch is larger."""
    approx_kl_sum: Tensor
    """Summed estimate of KL(old policy || policy) in nats, by token."""
    ratio_max_abs_log: Tensor
    """Largest |log rho| of a token, in nats; 0 without tokens."""


class TokenLoss(NamedTuple):
    """Result of `cispo_loss`: scalars, of which only `loss_sum` has a gradient."""

    loss_sum: Tensor
    """Summed loss; divide by the number of tokens of the mini-batch."""
    num_tokens: Tensor
    """Number of response tokens."""
    clip_sum: Tensor
    """Number of tokens whose weight the bounds changed."""
    approx_kl_sum: Tensor
    """Summed estimate of KL(old policy || policy) in nats."""
    ratio_max_abs_log: Tensor
    """Largest |log rho| before the clamp, in nats; 0 without tokens."""


class KLLoss(NamedTuple):
    """Result of `kl_loss`."""

    loss_sum: Tensor
    """Summed loss, whose gradient is that of KL(policy || reference); its value means nothing."""
    kl_sum: Tensor
    """Sum of log pi - log pi_ref over the tokens, in nats, without gradient."""
    num_tokens: Tensor
    """Number of response tokens."""


class EntropyLoss(NamedTuple):
    """Result of `entropy_loss`: scalars, of which only `loss_sum` has a gradient."""

    loss_sum: Tensor
    """Minus the summed entropy."""
    num_tokens: Tensor
    """Number of response tokens."""


class RatioMask(NamedTuple):
    """Result of `ratio_mask`, without gradient."""

    outside: Tensor
    """[tokens] bool, response tokens whose ratio is out of bounds; false off the mask."""
    num_outside: Tensor
    """Their number."""


def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> SequenceLoss:
    """Group sequence policy optimisation, in its token form.

        s      = exp(mean over the sequence's tokens of logprobs - old_logprobs)
        s_t    = sg(s) pi_t / sg(pi_t)      the value of s, the gradient of the token's log-prob
        loss_t = max(-s_t A_t, -clip(s_t, 1 - clip_low, 1 + clip_high) A_t)

    Args:
        logprobs: [tokens], of the policy being trained; the only input with a gradient.
        old_logprobs: [tokens], of the policy that sampled.
        advantages: [tokens].
        mask: [tokens], response tokens.
        cu_seqlens: [seqs + 1], boundaries of the packed sequences.
        clip_low: in (0, 1]; the source uses 3e-4.
        clip_high: above 0; the source uses 4e-4.

    Returns:
        The sum over sequences of their tokens' mean loss, with counts.

    Raises:
        ValueError: shapes disagree, or a bound is out of range.

    Source: arXiv 2507.18071, eq. 5 and 13-14.
    """
    _check_clip(clip_low, clip_high)
    check_shapes(logprobs, old_logprobs=old_logprobs, advantages=advantages)
    index, segment, num_seqs = response_tokens(logprobs, mask, cu_seqlens)
    log_ratio, largest = _log_ratio(logprobs[index], old_logprobs[index])
    advantage = as_float(advantages.detach()[index])
    counts = torch.bincount(segment, minlength=num_seqs).to(log_ratio.dtype)
    totals = log_ratio.new_zeros(num_seqs).index_add(0, segment, log_ratio.detach())
    level = (totals / counts.clamp(min=1))[segment].exp()
    ratio = level * (log_ratio - log_ratio.detach()).exp()
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, clipped) / counts[segment]
    return SequenceLoss(
        loss.sum(),
        (counts > 0).sum(),
        mask.sum(),
        (clipped > plain).sum(),
        _approx_kl(log_ratio).sum(),
        largest,
    )


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> TokenLoss:
    """Clipped importance-sampling policy optimisation: every token keeps a gradient.

        loss_t = -sg(clip(rho_t, 1 - clip_low, 1 + clip_high)) A_t logprobs_t

    Args:
        logprobs: [tokens], of the policy being trained; the only input with a gradient.
        old_logprobs: [tokens], of the policy that sampled.
        advantages: [tokens].
        mask: [tokens], response tokens.
        clip_low: in (0, 1]; 1 sets no lower bound.
        clip_high: above 0.

    Returns:
        Sums over the mask.

    Raises:
        ValueError: shapes disagree, or a bound is out of range.

    Source: arXiv 2506.13585, eq. 4-5.
    """
    _check_clip(clip_low, clip_high)
    mask = check_mask(logprobs, mask)
    check_shapes(logprobs, old_logprobs=old_logprobs, advantages=advantages)
    log_ratio, largest = _log_ratio(select(logprobs, mask), select(old_logprobs, mask))
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -weight * select(advantages.detach(), mask) * select(logprobs, mask)
    return TokenLoss(
        loss.sum(),
        mask.sum(),
        (mask & (weight != ratio)).sum(),
        _approx_kl(log_ratio).sum(),
        largest,
    )


def kl_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
) -> KLLoss:
    """Loss with the gradient of KL(policy || reference), also after the policy has moved.

        loss_t = sg(rho_t (logprobs_t - ref_logprobs_t)) logprobs_t

    Differentiating the estimators k1, k2 or k3 themselves gives other gradients: zero on average,
    right on-policy alone, and that of another divergence.

    Args:
        logprobs: [tokens], of the policy being trained; the only input with a gradient.
        old_logprobs: [tokens], of the policy that sampled.
        ref_logprobs: [tokens], of the reference.
        mask: [tokens], response tokens.

    Returns:
        Sums over the mask. The caller multiplies the loss by its coefficient.

    Raises:
        ValueError: shapes disagree.

    Source: arXiv 2510.01555, section 4.
    """
    mask = check_mask(logprobs, mask)
    check_shapes(logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    current = select(logprobs, mask)
    log_ratio, _ = _log_ratio(current.detach(), select(old_logprobs, mask))
    distance = current.detach() - select(ref_logprobs.detach(), mask)
    return KLLoss((log_ratio.exp() * distance * current).sum(), distance.sum(), mask.sum())


def entropy_loss(entropy: Tensor, mask: Tensor) -> EntropyLoss:
    """Loss that rewards the policy's entropy, to be added to the policy loss.

        loss_t = -H_t

    Args:
        entropy: [tokens], of the distribution that each token was drawn from, in nats; with a
            gradient.
        mask: [tokens], response tokens.

    Returns:
        Sums over the mask. The caller multiplies the loss by its coefficient.

    Raises:
        ValueError: shapes disagree.

    Source: arXiv 1707.06347, eq. 9.
    """
    mask = check_mask(entropy, mask)
    return EntropyLoss(-select(entropy, mask).sum(), mask.sum())


@torch.no_grad()
def ratio_mask(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    *,
    low: float,
    high: float,
) -> RatioMask:
    """Tokens that must carry no gradient, since the policy has moved too far there.

        outside_t = rho_t < low or rho_t > high      rho_t = exp(logprobs_t - old_logprobs_t)

    PPO's clip stops the gradient on one side, by the sign of the advantage; this mask on both.

    Args:
        logprobs: [tokens], of the policy being trained.
        old_logprobs: [tokens], of the policy that sampled.
        mask: [tokens], response tokens.
        low: lower bound of the ratio, in [0, 1).
        high: upper bound, above 1; infinity sets none.

    Returns:
        The tokens out of bounds, and their number.

    Raises:
        ValueError: shapes disagree, or a bound is out of range.

    Source: arXiv 2607.07508.
    """
    if not 0 <= low < 1 < high:
        raise ValueError(f"low={low} must lie in [0, 1), high={high} be over 1")
    mask = check_mask(logprobs, mask)
    check_shapes(logprobs, old_logprobs=old_logprobs)
    log_ratio, _ = _log_ratio(select(logprobs, mask), select(old_logprobs, mask))
    ratio = log_ratio.exp()
    outside = mask & ((ratio < low) | (ratio > high))
    return RatioMask(outside, outside.sum())


@torch.no_grad()
def overlong_penalty(lengths: Tensor, *, limit: int, buffer: int) -> Tensor:
    """Soft penalty of long responses, to be added to their scores.

        0 up to limit - buffer, then (limit - buffer - R) / buffer down to -1 at the limit

    Args:
        lengths: [seqs], number R of response tokens of each sequence.
        limit: length at which the penalty is complete, in tokens.
        buffer: tokens over which it sets in, in 1..limit.

    Returns:
        [seqs] float32, in -1..0.

    Raises:
        ValueError: buffer is not in 1..limit.

    Source: arXiv 2503.14476, eq. 13.
    """
    if not 1 <= buffer <= limit:
        raise ValueError(f"buffer={buffer}: must lie in 1..limit={limit}")
    return ((limit - buffer - lengths.float()) / buffer).clamp(-1.0, 0.0)


@torch.no_grad()
def noise_corrected(scores: Tensor, *, rho0: float, rho1: float) -> Tensor:
    """Backward correction of a verifier's errors: unbiased scores for known error rates.

        (score - rho0) / (1 - rho0 - rho1)

    Args:
        scores: [seqs], verdicts in 0..1.
        rho0: share of wrong answers that are accepted.
        rho1: share of right answers that are rejected.

    Returns:
        [seqs], of the scores' dtype.

    Raises:
        ValueError: a rate is negative, or together they are not under 1.

    Source: arXiv 2510.00915, backward correction.
    """
    if not (rho0 >= 0 and rho1 >= 0 and rho0 + rho1 < 1):
        raise ValueError(f"rho0={rho0}, rho1={rho1}: must be 0 or more, and together under 1")
    return (as_float(scores) - rho0) / (1 - rho0 - rho1)


def _check_clip(clip_low: float, clip_high: float) -> None:
    if not (0 < clip_low <= 1 and clip_high > 0):
        raise ValueError(f"clip_low={clip_low} must lie in (0, 1], clip_high={clip_high} be over 0")


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Clamped log ratio with the gradient of `logprobs`, and its largest size before the clamp."""
    log_ratio = as_float(logprobs) - as_float(old_logprobs.detach())
    largest = log_ratio.detach().abs().max() if len(log_ratio) > 0 else log_ratio.new_zeros(())
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), largest


def _approx_kl(log_ratio: Tensor) -> Tensor:
    return torch.expm1(log_ratio.detach()) - log_ratio.detach()
