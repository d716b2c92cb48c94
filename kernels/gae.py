"""The discounted scan of advantage estimation over packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def discounted_suffix_sums(x: Tensor, decay: Tensor, *, max_length: int | None = None) -> Tensor:
    """Discounted sums from the right, in about log2(max_length) vectorised steps.

        y_t = x_t + decay_t * y_{t+1}, with y = 0 beyond the end

    computed by doubling k = 1, 2, 4, ... with a = decay at first:

        y_t <- y_t + a_t * y_{t+k}        a_t <- a_t * a_{t+k}

    Decays are multiplied and never divided by, so fp32 stays accurate at any length. A decay of 0
    ends a segment: nothing to its right reaches it, NaN and infinity included.

    Args:
        x: [n], floating point.
        decay: [n], of the dtype of `x`.
        max_length: elements of the longest segment; None: n. Longer segments are cut short.

    Returns:
        [n] in the dtype of `x`.

    Raises:
        ValueError: shapes or dtypes disagree, or max_length is negative.

    Source: Hillis and Steele, "Data parallel algorithms", 1986.
    """
    if x.ndim != 1 or decay.shape != x.shape:
        raise ValueError(
            f"x and decay have shapes {list(x.shape)} and {list(decay.shape)}, must both be [n]"
        )
    if not x.is_floating_point() or decay.dtype != x.dtype:
        raise ValueError(
            f"x and decay are {x.dtype} and {decay.dtype}, must be of one floating-point dtype"
        )
    if max_length is not None and max_length < 0:
        raise ValueError(
            f"max_length is {max_length}, must be at least 0: leave it out for the whole length"
        )
    y = x
    a = decay
    longest = x.shape[0] if max_length is None else min(max_length, x.shape[0])
    k = 1
    while k < longest:
        near = a[:-k]
        far = torch.where(near == 0, 0.0, y[k:])  # 0 * NaN would be NaN: keep segments apart
        y = torch.cat([y[:-k] + near * far, y[-k:]])
        a = torch.cat([near * a[k:], torch.zeros_like(a[-k:])])
        k *= 2
    return y.clone() if y is x else y
