"""Slow and simple versions of the kernels, with which the tests compare them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, [n] each, through dense [n, v] tensors."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(dtype) @ weight.to(dtype).T / temperature
    log_p = torch.log_softmax(logits, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), entropy


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Sequence[int],
    *,
    scale: float | None = None,
) -> Tensor:
    """Causal attention by sequence and head, with the softmax written out: [tokens, heads, dim]."""
    heads, dim = query.shape[1:]
    group = heads // key.shape[1]
    factor = dim**-0.5 if scale is None else scale
    out = torch.zeros_like(query)
    for start, stop in pairwise(cu_seqlens):
        for head in range(heads):
            q = query[start:stop, head]
            k = key[start:stop, head // group]
            v = value[start:stop, head // group]
            square = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device)
            future = square.triu(1)
            scores = (factor * q @ k.T).masked_fill(future, float("-inf"))
            out[start:stop, head] = torch.softmax(scores, dim=-1) @ v
    return out


def discounted_suffix_sums(x: Tensor, decay: Tensor) -> Tensor:
    """y_t = x_t + decay_t * y_{t+1} from the right, one element at a time: [n]."""
    y = torch.zeros_like(x)
    carry = 0.0
    for t in range(x.shape[0] - 1, -1, -1):
        reached = float(decay[t]) * carry if float(decay[t]) != 0 else 0.0
        carry = float(x[t]) + reached
        y[t] = carry
    return y
