"""Selection and checks of packed tensors, for the formulas of PPO."""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Log ratios are clamped to plus and minus this value (nats) before exp.

e^20 leaves fp32 room for sums and squares.
"""


def as_float(x: Tensor) -> Tensor:
    """The tensor in fp32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def select(x: Tensor, mask: Tensor) -> Tensor:
    """The tensor on the mask, 0 off it, with a gradient of 0 there.

    Multiplying by the mask instead would keep a NaN in both.
    """
    return torch.where(mask, as_float(x), 0.0)


def response_tokens(x: Tensor, mask: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, int]:
    """Positions of the response tokens, the sequence of each, and the number of sequences.

    Raises:
        ValueError: shapes disagree, or `cu_seqlens` does not rise from 0 to the last token.
    """
    index = check_mask(x, mask).nonzero().squeeze(1)
    bounds = check_bounds(mask, cu_seqlens)
    segment = torch.searchsorted(cu_seqlens.to(index.dtype), index, right=True) - 1
    return index, segment, len(bounds) - 1


def check_bounds(mask: Tensor, cu_seqlens: Tensor) -> list[int]:
    """The boundaries of the packed sequences as integers.

    Raises:
        ValueError: they do not rise from 0 to the last token.
    """
    bounds = cu_seqlens.tolist()
    if bounds[:1] != [0] or bounds[-1] != len(mask) or bounds != sorted(bounds):
        raise ValueError(
            f"cu_seqlens is {bounds}, must rise from 0 to the {len(mask)} tokens of the mask"
        )
    return bounds


def continues(segment: Tensor) -> Tensor:
    """For each response token, whether another one of the same sequence follows."""
    result = torch.zeros_like(segment, dtype=torch.bool)
    result[:-1] = segment[1:] == segment[:-1]
    return result


def check_mask(x: Tensor, mask: Tensor) -> Tensor:
    """The mask as booleans.

    Raises:
        ValueError: it is not [tokens] like `x`, or holds floating-point numbers.
    """
    if x.ndim != 1 or mask.shape != x.shape:
        raise ValueError(
            f"the mask has shape {list(mask.shape)}, its tensor {list(x.shape)}: "
            "both must be [tokens]"
        )
    if mask.is_floating_point():
        raise ValueError(
            f"the mask is {mask.dtype}, must be boolean or integer: "
            "was another tensor passed in its place?"
        )
    return mask.bool()


def check_shapes(x: Tensor, **others: Tensor) -> None:
    """Raises ValueError, by name, for a tensor whose shape is not that of `x`."""
    for name, other in others.items():
        if other.shape != x.shape:
            raise ValueError(
                f"{name} has shape {list(other.shape)}, must have {list(x.shape)} "
                "like the first tensor"
            )
