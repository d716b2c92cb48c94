"""Operations, traffic and expected seconds of the phases of a step."""

from __future__ import annotations

from dataclasses import dataclass

from .model_shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a machine achieves, for the estimate of times."""

    flops: float
    """Floating-point operations per second of a GPU, after the MFU."""
    memory: float
    """Bytes per second between a GPU and its memory, as achieved in decoding."""
    link: float
    """Bytes per second that each GPU exchanges with the others."""
    pcie: float
    """Bytes per second between a GPU and the host."""
    host: float
    """Bytes per second of a host's memory."""
    disk: float
    """Bytes per second of a shared folder."""


def forward_flops(shape: ModelShape, tokens: float, *, context: float, head: bool = True) -> float:
    """Operations of a forward pass: 2 P' T + 2 L q c T, P' the parameters that multiply a token.

    Args:
        shape: sizes of the model.
        tokens: number of tokens.
        context: length of a sequence; causal attention sees half of it on average.
        head: whether the language-model head takes part.

    Source: arXiv 2001.08361, section 2.1.
    """
    active = shape.active_parameters
    matrices = active - shape.embedding if not shape.tied else active
    if not head:
        matrices = active - shape.embedding * (1 if shape.tied else 2)
    attention = 2 * shape.layers * shape.query_size * context
    return tokens * (2 * matrices + attention)


def training_flops(
    shape: ModelShape,
    tokens: float,
    *,
    context: float,
    checkpointing: bool,
    head: bool = True,
) -> float:
    """Operations of forward and backward pass: 3 forward passes, 4 with recomputation."""
    passes = 4 if checkpointing else 3
    return passes * forward_flops(shape, tokens, context=context, head=head)


def decode_seconds(
    shape: ModelShape,
    *,
    slots: float,
    context: float,
    size: int,
    speed: Speed,
    tensor_parallel: int = 1,
    launch: float = 0.0,
) -> float:
    """Seconds of one decoding step of a batch: weights and cache are read once.

    Args:
        shape: sizes of the model.
        slots: responses in the batch.
        context: tokens in each one's cache.
        size: bytes of a number.
        speed: speed of a GPU.
        tensor_parallel: GPUs that share the weights.
        launch: seconds of launching kernels, where nothing hides them.
    """
    cache = slots * context * 2 * shape.layers * shape.kv_size * size
    read = (size * shape.active_parameters + cache) / speed.memory
    work = forward_flops(shape, slots, context=2 * context) / speed.flops
    return max(read, work) / tensor_parallel + launch


def gather_bytes(parameters: int, *, size: int, stage: int, ranks: int, passes: int) -> float:
    """Bytes that a rank receives to gather all weights for `passes` passes; 0 below ZeRO-3."""
    if stage < 3 or ranks == 1:
        return 0.0
    return passes * size * parameters * (ranks - 1) / ranks


def reduce_bytes(parameters: int, *, size: int, stage: int, ranks: int) -> float:
    """Bytes that a rank exchanges to reduce gradients and, below ZeRO-3, to share new weights.

    A reduce-scatter moves B P (N-1)/N; an all-gather of the new weights, or the second half of an
    all-reduce, as much again.
    """
    if ranks == 1:
        return 0.0
    halves = 1 if stage == 3 else 2
    return halves * size * parameters * (ranks - 1) / ranks


def optimizer_seconds(
    parameters: int,
    *,
    ranks: int,
    ranks_per_host: int,
    offloaded: bool,
    speed: Speed,
) -> float:
    """Seconds of an AdamW step, which reads and writes 28 bytes a parameter.

    Offloaded, the host's memory does that for all its ranks; gradients and weights cross PCIe.
    """
    share = parameters / ranks
    if not offloaded:
        return 28 * share / speed.memory
    return 28 * share * ranks_per_host / speed.host + 4 * share / speed.pcie
