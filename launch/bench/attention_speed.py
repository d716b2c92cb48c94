"""`verippo bench attention`: attention over packed sequences, forward and backward."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from ...core.bounds import CountingInt, SeedInt, check_bounds
from ...core.training import dist
from ...kernels.attention import choose_backend, varlen_attention
from .measure import DTYPES, Machine, measure


@dataclass(frozen=True, kw_only=True)
class AttentionBenchConfig:
    """Measures causal attention over packed sequences with its gradients."""

    lengths: str = "1200,800,400,200"
    """Tokens of each sequence."""
    heads: CountingInt = 8
    """Heads of the query."""
    kv_heads: CountingInt = 4
    """Heads of keys and values."""
    head_dim: CountingInt = 64
    """Size of a head."""
    dtype: Literal["bf16", "fp32"] = "fp32"
    """Data type of query, key and value."""
    repeats: CountingInt = 3
    """Number of runs, after one that measures memory; the median is printed."""
    seed: SeedInt = 0
    """Seed of the random numbers."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.lengths):
            raise ValueError(f"lengths={self.lengths}: must be positive numbers, like 1200,800")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads}: must be a multiple of kv_heads={self.kv_heads}")

    @property
    def sizes(self) -> list[int]:
        """The lengths as numbers."""
        return [int(length) for length in self.lengths.split(",")]

    @property
    def operations(self) -> int:
        """Operations of the forward and the backward pass.

        Two products forward and four backward, each of 2 dim operations for every pair of a token
        and one that it sees. Fused kernels also compute the scores again: seven products.
        """
        pairs = sum(length * (length + 1) // 2 for length in self.sizes)
        return 6 * 2 * self.head_dim * self.heads * pairs


def bench(config: AttentionBenchConfig, *, resolved: dict[str, Any]) -> None:
    """Runs the command `bench attention`."""
    dtype = DTYPES[config.dtype]
    machine = Machine(dtype=dtype)
    torch.manual_seed(config.seed)
    bounds = [0, *accumulate(config.sizes)]

    def random(heads: int) -> Tensor:
        x = torch.randn(bounds[-1], heads, config.head_dim, device=dist.device())
        return x.to(dtype).requires_grad_()

    query, key, value = map(random, (config.heads, config.kv_heads, config.kv_heads))

    def forward() -> Tensor:
        return varlen_attention(query, key, value, bounds, max(config.sizes))

    def step() -> None:
        torch.autograd.grad(forward().sum(), (query, key, value))

    for figure, call, operations in (
        ("attention_forward", forward, config.operations // 3),
        ("attention", step, config.operations),
    ):
        machine.print_cost(
            figure,
            measure(call, repeats=config.repeats),
            tokens=bounds[-1],
            operations=operations,
            backend=choose_backend(query),
            lengths=config.lengths,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=config.dtype,
        )
