"""Causal attention over packed sequences, with one signature for every backend."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["flash_attn", "torch_varlen", "sdpa"]


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    max_seqlen: int,
    *,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of each token to itself and the tokens before it in its own sequence.

        softmax(scale * q k^T) v

    Args:
        query: [tokens, heads, dim].
        key: [tokens, kv_heads, dim], heads a multiple of kv_heads; query head i reads key head
            i // (heads / kv_heads).
        value: [tokens, kv_heads, dim].
        cu_seqlens: [seqs + 1], rising from 0 to tokens: an int32 tensor, or a list of ints, which
            saves the SDPA backend from waiting for the GPU.
        max_seqlen: tokens of the longest sequence; fused backends size their grid by it.
        scale: default: dim ** -0.5.

    Returns:
        [tokens, heads, dim] in the query's dtype.

    Raises:
        ValueError: shapes disagree, or boundaries given on the host do not rise from 0 to tokens.
    """
    _check(query, key, value, cu_seqlens)
    backend = choose_backend(query)
    if backend == "sdpa":
        return _sdpa(query, key, value, _boundaries(cu_seqlens, query.shape[0]), scale)
    cu = torch.as_tensor(cu_seqlens, dtype=torch.int32, device=query.device)
    if backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            query, key, value, cu, cu, max_seqlen, max_seqlen, softmax_scale=scale, causal=True
        )
    from torch.nn.attention.varlen import varlen_attn

    gqa = key.shape[1] != query.shape[1]
    causal = (-1, 0)
    options: dict[str, Any] = {"scale": scale, "window_size": causal, "enable_gqa": gqa}
    out = varlen_attn(query, key, value, cu, cu, max_seqlen, max_seqlen, **options)
    assert isinstance(out, Tensor)  # a pair only when the log-sum-exp is requested
    return out


def choose_backend(query: Tensor) -> Backend:
    """The fastest backend for a query: flash-attn if installed, torch's varlen kernel, or SDPA.

    The first two need at least one token, a GPU of compute capability 8.0, fp16 or bf16, and a
    head dimension that is a multiple of 8 and at most 256.
    """
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return "sdpa"
    if query.shape[0] == 0 or query.shape[-1] > 256 or query.shape[-1] % 8 != 0:
        return "sdpa"
    return _fused_backend() if torch.cuda.get_device_capability(query.device) >= (8, 0) else "sdpa"


@functools.cache
def _fused_backend() -> Backend:
    if importlib.util.find_spec("flash_attn") is not None:
        return "flash_attn"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "sdpa"
    # torch 2.10 has the function, but without grouped queries and scale
    wanted = {"scale", "window_size", "enable_gqa"}
    return "torch_varlen" if wanted <= inspect.signature(varlen_attn).parameters.keys() else "sdpa"


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Sequence[int],
    scale: float | None,
) -> Tensor:
    """One call per sequence: a [tokens, tokens] mask would cost several times the work."""
    sizes = [stop - start for start, stop in pairwise(boundaries) if stop > start] or [0]
    gqa = key.shape[1] != query.shape[1]
    q, k, v = (x.transpose(0, 1).unsqueeze(0).split(sizes, dim=2) for x in (query, key, value))
    attend = functools.partial(
        F.scaled_dot_product_attention, is_causal=True, scale=scale, enable_gqa=gqa
    )
    outs = [attend(*segment) for segment in zip(q, k, v, strict=True)]
    return torch.cat(outs, dim=2).squeeze(0).transpose(0, 1)


def _boundaries(cu_seqlens: Tensor | Sequence[int], tokens: int) -> list[int]:
    boundaries = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    ends = boundaries[:1] == [0] and boundaries[-1] == tokens
    if not ends or boundaries != sorted(boundaries):
        raise ValueError(
            f"cu_seqlens is {boundaries}, must rise from 0 to the {tokens} tokens of the query"
        )
    return boundaries


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | Sequence[int],
) -> None:
    shapes = (
        f"query, key, value have shapes {list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
    )
    same = value.shape == key.shape and query.shape[:1] == key.shape[:1]
    if query.ndim != 3 or key.ndim != 3 or not same:
        raise ValueError(
            f"{shapes}: must be [tokens, heads, dim] for the query, else [tokens, kv_heads, dim]"
        )
    if query.shape[2] != key.shape[2] or query.shape[1] % key.shape[1] != 0:
        raise ValueError(f"{shapes}: dim must be the same, and heads a multiple of kv_heads")
    if not isinstance(cu_seqlens, Tensor):
        _boundaries(cu_seqlens, query.shape[0])
