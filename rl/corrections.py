"""Corrections of the PPO update for long answers and for samplers that differ from the trainer."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .token_masks import LOG_RATIO_LIMIT


@torch.no_grad()
def adaptive_lambda(lengths: Tensor, *, alpha: float = 0.05) -> Tensor:
    """Length-adaptive lambda of generalised advantage estimation.

        lam = max(0, 1 - 1 / (alpha R))

    Args:
        lengths: [seqs], number R of response tokens of each sequence.
        alpha: scale; larger values bring lambda closer to 1.

    Returns:
        [seqs] float32, for `gae(lam=...)`.

    Raises:
        ValueError: alpha is not above 0.

    Source: arXiv 2504.05118, section 4.2.
    """
    if not alpha > 0:
        raise ValueError(f"alpha={alpha}: must be above 0")
    return (1 - 1 / (alpha * lengths.clamp(min=1).float())).clamp(min=0.0)


class Correction(NamedTuple):
    """Weights for the difference between the sampler's and the trainer's log-probs."""

    weights: Tensor
    """[tokens], 0 off the mask, without gradient; goes into `policy_loss(importance=...)`."""
    num_touched: Tensor
    """Number of response tokens whose weight the bounds changed."""
    effective_sample_size: Tensor
    """(sum u)^2 / (n sum u^2) over the n response tokens, in 0..1."""


@torch.no_grad()
def sampler_correction(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    *,
    level: Literal["token", "sequence", "geometric"],
    mode: Literal["truncate", "clip", "mask"],
    low: float,
    high: float,
) -> Correction:
    """Importance weights pi_trainer / pi_sampler of the response tokens, bounded.

        w_t = exp(logprobs_t - sampler_logprobs_t)
        level   token: u_t = w_t   sequence: u = prod_t w_t   geometric: u = (prod_t w_t)^(1/R)
        mode    truncate: min(u, high)   clip: clamp(u, low, high)
                mask: u if low <= u <= high else 0

    Args:
        logprobs: [tokens], by the trainer's own forward before the update.
        sampler_logprobs: [tokens], as the sampler reported them.
        mask: [tokens] bool, response tokens; nothing else is read.
        cu_seqlens: [seqs + 1], boundaries of the packed sequences.
        level: what a weight belongs to: a token, or all response tokens of a sequence.
        mode: what happens to a weight outside the bounds.
        low: lower bound; not used by "truncate".
        high: upper bound.

    Returns:
        The weights [tokens] with their statistics.

    Raises:
        ValueError: an unknown level or mode, or bounds that are not 0 <= low <= high, high > 0.
    """
    _check(level, mode, low, high)
    log_ratio = torch.where(mask, logprobs - sampler_logprobs, 0.0)
    if level != "token":
        num_seqs = len(cu_seqlens) - 1
        lengths = cu_seqlens.diff().to(torch.int64)
        seq_ids = torch.repeat_interleave(torch.arange(num_seqs, device=mask.device), lengths)
        sums = log_ratio.new_zeros(num_seqs).index_add(0, seq_ids, log_ratio)
        if level == "geometric":
            counts = log_ratio.new_zeros(num_seqs).index_add(0, seq_ids, mask.to(log_ratio.dtype))
            sums = sums / counts.clamp(min=1)
        log_ratio = sums[seq_ids]
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if mode == "truncate":
        bounded = ratio.clamp(max=high)
    elif mode == "clip":
        bounded = ratio.clamp(low, high)
    else:
        bounded = torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)
    weights = torch.where(mask, bounded, 0.0)
    touched = mask & (bounded != ratio)
    square_sum = (mask.sum() * weights.square().sum()).clamp(min=torch.finfo(weights.dtype).tiny)
    return Correction(weights, touched.sum(), weights.sum().square() / square_sum)


def _check(
    level: str,
    mode: str,
    low: float,
    high: float,
) -> None:
    if level not in ("token", "sequence", "geometric"):
        raise ValueError(f"level={level!r}: must be token, sequence or geometric")
    if mode not in ("truncate", "clip", "mask"):
        raise ValueError(f"mode={mode!r}: must be truncate, clip or mask")
    if not (0 <= low <= high and high > 0):
        raise ValueError(f"low={low}, high={high}: must be 0 <= low <= high, with high above 0")
