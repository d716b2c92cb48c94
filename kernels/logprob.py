"""Hidden states and the head's weight -> log-probs and entropies of given tokens, never a [tokens, vocab] tensor."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_TOKENS = {
    "cpu": 128,
    "cuda": 512,
}  # a CPU's chunk should stay near its cache, a GPU's product wants more rows
_LOW_PRECISION = (torch.bfloat16, torch.float16)


class TokenLogprobs(NamedTuple):
    """What `linear_logprobs(..., with_entropy=True)` returns: both [n], in nats."""

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
    chunk_tokens: int | None = None,
) -> TokenLogprobs: ...
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_tokens: int | None = None,
) -> Tensor | TokenLogprobs:
    """Log-probability of targets[i] under softmax(hidden[i] @ weight.T / temperature), and if asked the entropy there.

        z = hidden @ weight.T / temperature     logprob = z[target] - logsumexp(z)     entropy = -sum_j p_j log p_j

    Takes `chunk_tokens` rows at a time (None: 128 on CPU, 512 on a GPU); the backward pass makes each chunk's logits
    again. Peak extra memory is one chunk of logits (two with entropy) and, for a trained weight, its fp32 gradient.

    hidden [n, h], weight [v, h], targets [n] int64; n may be 0. Returns [n] in nats, fp32 whatever the inputs (float64
    for float64): products of bf16 and fp16 are accumulated and kept in fp32. Both outputs give gradients to hidden and
    weight. Raises ValueError for shapes that do not fit, a target outside 0..v-1, temperature <= 0, chunk_tokens < 1.
    """
    _check(hidden, weight, targets, temperature, chunk_tokens)
    chunk = chunk_tokens or _CHUNK_TOKENS.get(hidden.device.type, 512)
    logprobs, entropy = _LinearLogprobs.apply(
        hidden, weight, targets, temperature, with_entropy, chunk
    )
    return TokenLogprobs(logprobs, entropy) if with_entropy else logprobs


@torch.no_grad()
def linear_greedy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_tokens: int | None = None
) -> Tensor:
    """Whether targets[i] is the likeliest token under hidden[i] @ weight.T: [n] bool, in chunks as `linear_logprobs`.

    hidden [n, h], weight [v, h], targets [n] int64. Raises ValueError as `linear_logprobs` does.
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
        chunk: int,
    ) -> tuple[Tensor, Tensor | None]:
        head = _Head(hidden, weight, temperature, chunk)
        logprobs = hidden.new_empty(hidden.shape[0], dtype=head.dtype)
        top, total = torch.empty_like(logprobs), torch.empty_like(logprobs)
        entropy = torch.empty_like(logprobs) if with_entropy else None
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
        # Not their sum, the log-sum-exp: rounded at the size of the largest logit it would cost digits of the gradient.
        ctx.save_for_backward(hidden, weight, targets, top, total, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(
            False
        )  # the gradient of an unused output is None, and its share of the work left out
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, top, total, entropy = ctx.saved_tensors
        head = _Head(hidden, weight, ctx.temperature, ctx.chunk)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = (
            torch.zeros_like(weight, dtype=head.dtype) if ctx.needs_input_grad[1] else None
        )
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(top)
        for rows in _chunks(hidden.shape[0], ctx.chunk):
            d = head.logits(rows).sub_(
                top[rows, None]
            )  # made in place into the gradient of hidden @ weight.T
            g = (grad_logprobs[rows] / ctx.temperature)[:, None]
            if grad_entropy is None:
                d.exp_().mul_(-g / total[rows, None])
            else:  # d entropy / d z_j = -p_j (log p_j + entropy); p = exps / total, log p = d - log(total)
                g_entropy = (grad_entropy[rows] / ctx.temperature)[:, None]
                exps = head.exp(d)
                d.add_((entropy[rows] - total[rows].log())[:, None]).mul_(
                    -g_entropy / total[rows, None]
                )
                d.sub_(g / total[rows, None]).mul_(exps)
            d.scatter_add_(1, targets[rows, None], g)
            d = d.to(head.weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = d @ head.weight
            if grad_weight is not None:
                _add_product(grad_weight, d.t(), hidden[rows].to(d.dtype))
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
            None,
            None,
        )


class _Head:
    """Logits of a chunk of rows over the temperature, in the accumulation dtype; one buffer serves all chunks."""

    def __init__(self, hidden: Tensor, weight: Tensor, temperature: float, chunk: int) -> None:
        self.dtype = (
            torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
        )
        # Only CUDA multiplies low precision into fp32; elsewhere the operands are cast, the weight once for all chunks.
        self.mixed = (
            hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype in _LOW_PRECISION
        )
        self.hidden = hidden
        self.weight = weight if self.mixed else weight.to(self.dtype)
        self.temperature = temperature
        self.buffer = hidden.new_empty(
            min(chunk, hidden.shape[0]), weight.shape[0], dtype=self.dtype
        )
        self.spare: Tensor | None = None

    def logits(self, rows: slice) -> Tensor:
        out = self.buffer[: rows.stop - rows.start]
        if self.mixed:
            torch.mm(self.hidden[rows], self.weight.t(), out_dtype=self.dtype, out=out)  # type: ignore[call-overload]
        else:
            torch.mm(self.hidden[rows].to(self.dtype), self.weight.t(), out=out)
        return out if self.temperature == 1.0 else out.div_(self.temperature)

    def exp(self, z: Tensor) -> Tensor:
        """exp(z) beside z, in a second buffer for all chunks."""
        if self.spare is None:
            self.spare = torch.empty_like(self.buffer)
        return torch.exp(z, out=self.spare[: z.shape[0]])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in total's dtype, and without a second tensor of total's size."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    # torch 2.10's addmm refuses an fp32 sum of bf16 products: blocks of at most 64 MiB are made, then added.
    block = max(1, 2**24 // total.shape[1])
    for part, rows in zip(total.split(block), a.split(block), strict=True):
        part += torch.mm(rows, b, out_dtype=total.dtype)  # type: ignore[call-overload]


def _chunks(n: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_tokens: int | None
) -> None:
    if (
        hidden.ndim != 2
        or weight.shape[1:] != hidden.shape[1:]
        or targets.shape != hidden.shape[:1]
    ):
        shapes = f"{list(hidden.shape)}, {list(weight.shape)}, {list(targets.shape)}"
        raise ValueError(
            f"hidden, weight, targets have shapes {shapes}, not [n, h], [v, h], [n]: flatten the batch"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}, not torch.int64: convert them with .long()")
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature}, must be over 0: greedy decoding has no log-probabilities"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(
            f"chunk_tokens is {chunk_tokens}, must be at least 1: leave it out for the default"
        )
    outside = (targets < 0) | (targets >= weight.shape[0])
    if bool(outside.any()):
        i = int(outside.nonzero()[0])
        raise ValueError(
            f"targets[{i}] is {int(targets[i])}, outside the vocabulary 0..{weight.shape[0] - 1}: drop it"
        )
