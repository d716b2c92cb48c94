"""The advantage scan over packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def discounted_suffix_sums(x: Tensor, decay: Tensor, *, max_length: int | None = None) -> Tensor:
    """The scan y_t = x_t + decay_t * y_{t+1}, y = 0 beyond the end, in about log2(max_length) vectorised steps.

        y_t <- y_t + a_t * y_{t+k}        a_t <- a_t * a_{t+k}        k = 1, 2, 4, ...; a = decay at first

    (Hillis and Steele 1986, "Data parallel algorithms".) Decays are multiplied and never divided by, so that fp32 is
    accurate at any length. A decay of 0 ends a segment: nothing to its right reaches it, NaN and infinity included.

    x and decay [n], floating point and of one dtype, which the result [n] keeps. `max_length` is the number of elements
    of the longest segment (None: n); with a longer one the sums are cut short. Raises ValueError for other shapes,
    dtypes, or a max_length < 0.
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
    y, a = x, decay
    longest = x.shape[0] if max_length is None else min(max_length, x.shape[0])
    k = 1
    while k < longest:
        near, far = (
            a[:-k],
            torch.where(a[:-k] == 0, 0.0, y[k:]),
        )  # 0 * NaN is NaN: one bad sequence stays alone
        y = torch.cat([y[:-k] + near * far, y[-k:]])
        a = torch.cat([near * a[k:], torch.zeros_like(a[-k:])])
        k *= 2
    return y.clone() if y is x else y
