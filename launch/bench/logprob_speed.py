"""`verippo bench logprobs`: log-probs and their gradients, without logits and from full logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.bounds import CountingInt, SeedInt, check_bounds
from ...core.training import dist
from ...kernels.logprob import linear_logprobs
from .measure import DTYPES, Machine, measure


@dataclass(frozen=True, kw_only=True)
class LogprobBenchConfig:
    """Measures log-probs of tokens with their gradients, without logits and from full logits."""

    num_tokens: CountingInt = 2048
    """Tokens whose log-probs are computed."""
    hidden_size: CountingInt = 512
    """Length of a hidden state."""
    vocabulary: CountingInt = 32_000
    """Number of token ids."""
    dtype: Literal["bf16", "fp32"] = "fp32"
    """Data type of hidden states and weights."""
    repeats: CountingInt = 3
    """Number of runs, after one that measures memory; the median is printed."""
    seed: SeedInt = 0
    """Seed of the random numbers."""

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def operations(self) -> int:
        """Operations of one pass forward and backward: three products of 2 n h v each.

        Without a slope `linear_logprobs` makes the logits again in the backward pass: four.
        """
        return 3 * 2 * self.num_tokens * self.hidden_size * self.vocabulary


def full_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs by way of a [tokens, vocabulary] tensor of logits: [tokens] fp32."""
    return -F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


def logprobs_of_known_slope(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probs whose gradients are made in the forward pass: [tokens] fp32."""
    return linear_logprobs(hidden, weight, targets, slope=lambda x, rows: torch.ones_like(x))


def bench(config: LogprobBenchConfig, *, resolved: dict[str, Any]) -> None:
    """Runs the command `bench logprobs`."""
    dtype = DTYPES[config.dtype]
    device = dist.device()
    machine = Machine(dtype=dtype)
    torch.manual_seed(config.seed)
    n = config.num_tokens
    hidden = torch.randn(n, config.hidden_size, device=device).to(dtype).requires_grad_()
    weight = torch.randn(config.vocabulary, config.hidden_size, device=device) * 0.02
    weight = weight.to(dtype).requires_grad_()
    targets = torch.randint(config.vocabulary, (n,), device=device)

    def step(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        torch.autograd.grad(function(hidden, weight, targets).sum(), (hidden, weight))

    for function in (logprobs_of_known_slope, linear_logprobs, full_logprobs):
        machine.print_cost(
            function.__name__,
            measure(lambda function=function: step(function), repeats=config.repeats),  # type: ignore[misc]
            tokens=n,
            operations=config.operations,
            hidden_size=config.hidden_size,
            vocabulary=config.vocabulary,
            dtype=config.dtype,
        )
