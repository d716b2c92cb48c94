"""Log-probs and entropies of tokens under a linear head, without [tokens, vocab] tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# on a CPU a chunk should stay near the cache; on a GPU the product needs more rows
_CHUNK_TOKENS = {"cpu": 128, "cuda": 512}
_LOW_PRECISION = (torch.bfloat16, torch.float16)
Slope = Callable[[Tensor, slice], Tensor]
"""Log-probs [m] of some rows, and which rows -> derivative [m] of a loss by each of them."""


class TokenLogprobs(NamedTuple):
    """Result of `linear_logprobs(..., with_entropy=True)`: [n] each, in nats."""

    logprobs: Tensor
    entropy: Tensor


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: Literal[False] = False,
    slope: Slope | None = None,
    chunk_tokens: int | None = None,
) -> Tensor: ...
@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: Literal[True],
    slope: Slope | None = None,
    chunk_tokens: int | None = None,
) -> TokenLogprobs: ...
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    slope: Slope | None = None,
    chunk_tokens: int | None = None,
) -> Tensor | TokenLogprobs:
    """Log-probabilities of target tokens under a linear head, and optionally entropies.

        z = hidden @ weight.T / temperature
        logprob = z[target] - logsumexp(z)        entropy = -sum_j p_j log p_j

    Works on `chunk_tokens` rows at a time; the backward pass recomputes each chunk's logits. Peak
    extra memory is one chunk of logits (two with entropy) and the weight's fp32 gradient.

    A loss that is a sum over tokens can say its `slope`, and the gradients are then made from the
    logits at hand, in the forward pass. The backward pass multiplies them by the factor between the
    gradient that arrives and the slope; where they are not multiples of each other it recomputes.

    Args:
        hidden: [n, h], hidden states; n may be 0.
        weight: [v, h], the head's weight.
        targets: [n] int64, token ids.
        temperature: divides the logits.
        with_entropy: whether to return the entropies too.
        slope: derivative of the loss to come by each log-prob, up to a factor that is the same for
            all. Not used with entropies, or where no gradient is wanted.
        chunk_tokens: rows at a time; None: 128 on CPU, 512 on a GPU.

    Returns:
        [n] in nats, or a pair of them; both differentiable in hidden and weight. fp32 (float64 for
        float64 inputs): products of bf16 and fp16 are accumulated and kept in fp32.

    Raises:
        ValueError: shapes disagree, or a target, temperature or chunk_tokens is out of range.
    """
    _check(hidden, weight, targets, temperature, chunk_tokens)
    chunk = chunk_tokens or _CHUNK_TOKENS.get(hidden.device.type, 512)
    if with_entropy or not torch.is_grad_enabled():
        slope = None
    logprobs, entropy = _LinearLogprobs.apply(
        hidden, weight, targets, temperature, with_entropy, slope, chunk
    )
    return TokenLogprobs(logprobs, entropy) if with_entropy else logprobs


@torch.no_grad()
def linear_greedy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Whether each target is the most likely token under a linear head, computed in chunks.

    Args:
        hidden: [n, h], hidden states.
        weight: [v, h], the head's weight.
        targets: [n] int64, token ids.
        chunk_tokens: as for `linear_logprobs`.

    Returns:
        [n] bool.

    Raises:
        ValueError: as `linear_logprobs`.
    """
    _check(hidden, weight, targets, 1.0, chunk_tokens)
    chunk = chunk_tokens or _CHUNK_TOKENS.get(hidden.device.type, 512)
    head = _Head(hidden, weight, 1.0, chunk)
    parts = [
        head.logits(rows).argmax(-1) == targets[rows] for rows in _chunks(hidden.shape[0], chunk)
    ]
    return torch.cat(parts) if parts else targets.bool()


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
        slope: Slope | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor | None]:
        head = _Head(hidden, weight, temperature, chunk)
        logprobs = hidden.new_empty(hidden.shape[0], dtype=head.dtype)
        top = torch.empty_like(logprobs)
        total = torch.empty_like(logprobs)
        entropy = torch.empty_like(logprobs) if with_entropy else None
        slopes = None if slope is None else torch.empty_like(logprobs)
        sums = _Gradients(hidden, weight, head, ctx.needs_input_grad if slope else (False, False))
        for rows in _chunks(hidden.shape[0], chunk):
            z = head.logits(rows)
            top[rows] = z.amax(dim=1)
            z.sub_(top[rows, None])
            target = z.gather(1, targets[rows, None]).squeeze(1)
            exps = z.exp_() if entropy is None else head.exp(z)
            total[rows] = exps.sum(dim=1)
            logprobs[rows] = target - total[rows].log()
            if entropy is not None:
                entropy[rows] = total[rows].log() - exps.mul_(z).sum(dim=1) / total[rows]
            if slope is not None and slopes is not None:
                slopes[rows] = slope(logprobs[rows], rows)
                g = (slopes[rows] / temperature)[:, None]
                exps.mul_(-g / total[rows, None]).scatter_add_(1, targets[rows, None], g)
                sums.add(exps, rows)
        # top and total, not the log-sum-exp: rounded at the size of the largest logit, it would
        # cost digits of the gradient
        ctx.save_for_backward(hidden, weight, targets, top, total, entropy, slopes)
        ctx.made = None if slope is None else (sums.hidden, sums.weight)
        ctx.temperature = temperature
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)  # an unused output then costs nothing in backward
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, top, total, entropy, slopes = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(top)
        made, ctx.made = ctx.made, None  # a second backward pass recomputes
        if made is not None and (factor := _factor(grad_logprobs, slopes)) is not None:
            grad_hidden, grad_weight = (None if x is None else x.mul_(factor) for x in made)
            return grad_hidden, _cast(grad_weight, weight.dtype), None, None, None, None, None
        head = _Head(hidden, weight, ctx.temperature, ctx.chunk)
        sums = _Gradients(hidden, weight, head, ctx.needs_input_grad)
        for rows in _chunks(hidden.shape[0], ctx.chunk):
            # d becomes, in place, the gradient of hidden @ weight.T
            d = head.logits(rows).sub_(top[rows, None])
            g = (grad_logprobs[rows] / ctx.temperature)[:, None]
            if grad_entropy is None:
                d.exp_().mul_(-g / total[rows, None])
            else:
                # d entropy / d z_j = -p_j (log p_j + entropy)
                # with p = exps / total and log p = d - log(total)
                g_entropy = (grad_entropy[rows] / ctx.temperature)[:, None]
                exps = head.exp(d)
                d.add_((entropy[rows] - total[rows].log())[:, None]).mul_(
                    -g_entropy / total[rows, None]
                )
                d.sub_(g / total[rows, None]).mul_(exps)
            d.scatter_add_(1, targets[rows, None], g)
            sums.add(d, rows)
        return sums.hidden, _cast(sums.weight, weight.dtype), None, None, None, None, None


def _factor(gradient: Tensor, slopes: Tensor) -> Tensor | None:
    """The number that makes the slopes the gradient; None if there is none."""
    if not len(slopes):
        return slopes.new_ones(())
    largest = slopes.abs().argmax()
    factor = torch.where(slopes[largest] == 0, 0.0, gradient[largest] / slopes[largest])
    gap = (gradient - factor * slopes).abs().max()
    return factor if bool(gap <= 1e-5 * gradient.abs().max()) else None


class _Gradients:
    """Gradients of hidden states and weight, summed over chunks of rows."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, head: _Head, needed: tuple[bool, ...]
    ) -> None:
        self.inputs = hidden
        self.head = head
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=head.dtype) if needed[1] else None

    def add(self, d: Tensor, rows: slice) -> None:
        """Adds what follows from the gradient `d` [m, v] of hidden @ weight.T in some rows."""
        d = d.to(self.head.weight.dtype)
        if self.hidden is not None:
            self.hidden[rows] = d @ self.head.weight
        if self.weight is not None:
            _add_product(self.weight, d.t(), self.inputs[rows].to(d.dtype))


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


class _Head:
    """Logits of a chunk of rows in the accumulation dtype; one buffer serves all chunks."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        temperature: float,
        chunk: int,
    ) -> None:
        double = torch.float64 in (hidden.dtype, weight.dtype)
        self.dtype = torch.float64 if double else torch.float32
        # only CUDA multiplies low precision into fp32; elsewhere the operands are cast
        low_precision = hidden.dtype == weight.dtype and hidden.dtype in _LOW_PRECISION
        self.mixed = hidden.is_cuda and low_precision
        self.hidden = hidden
        self.weight = weight if self.mixed else weight.to(self.dtype)
        self.temperature = temperature
        rows = min(chunk, hidden.shape[0])
        self.buffer = hidden.new_empty(rows, weight.shape[0], dtype=self.dtype)
        self.spare: Tensor | None = None

    def logits(self, rows: slice) -> Tensor:
        out = self.buffer[: rows.stop - rows.start]
        if self.mixed:
            torch.mm(self.hidden[rows], self.weight.t(), out_dtype=self.dtype, out=out)  # type: ignore[call-overload]
        else:
            torch.mm(self.hidden[rows].to(self.dtype), self.weight.t(), out=out)
        return out if self.temperature == 1.0 else out.div_(self.temperature)

    def exp(self, z: Tensor) -> Tensor:
        """exp(z) in a second buffer, which leaves z intact."""
        if self.spare is None:
            self.spare = torch.empty_like(self.buffer)
        return torch.exp(z, out=self.spare[: z.shape[0]])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in the dtype of total, without a second tensor of its size."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    # torch 2.10's addmm refuses an fp32 sum of bf16 products: add blocks of at most 64 MiB
    block = max(1, 2**24 // total.shape[1])
    for part, rows in zip(total.split(block), a.split(block), strict=True):
        part += torch.mm(rows, b, out_dtype=total.dtype)  # type: ignore[call-overload]


def _chunks(n: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    chunk_tokens: int | None,
) -> None:
    fits = weight.shape[1:] == hidden.shape[1:] and targets.shape == hidden.shape[:1]
    if hidden.ndim != 2 or not fits:
        shapes = f"{list(hidden.shape)}, {list(weight.shape)}, {list(targets.shape)}"
        raise ValueError(
            f"hidden, weight, targets have shapes {shapes}, not [n, h], [v, h], [n]: "
            "flatten the batch"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}, not torch.int64: convert them with .long()")
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature}, must be over 0: "
            "greedy decoding has no log-probabilities"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(
            f"chunk_tokens is {chunk_tokens}, must be at least 1: leave it out for the default"
        )
    outside = (targets < 0) | (targets >= weight.shape[0])
    if bool(outside.any()):
        i = int(outside.nonzero()[0])
        raise ValueError(
            f"targets[{i}] is {int(targets[i])}, outside the vocabulary "
            f"0..{weight.shape[0] - 1}: drop it"
        )
