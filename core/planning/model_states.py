"""Memory of a model's weights, gradients and optimizer states under DeepSpeed ZeRO.

The formulas follow what DeepSpeed 0.19 allocates for a `TrainEngine` or `FrozenEngine`: master
weights and both moments of Adam in fp32, gradients in the dtype of the weights. P is the number of
parameters, N that of ranks, B the bytes of the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..training.engine import EngineConfig

BYTES = {"bf16": 2, "fp32": 4}
"""Size of a number, by dtype."""
BUCKET = 500_000_000
"""Numbers in DeepSpeed's gradient bucket (reduce_bucket_size)."""
REUSE = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered for reuse (stage3_max_reuse_distance)."""
SUBGROUP = 1_000_000_000
"""Parameters that ZeRO-3 steps at once (sub_group_size)."""


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """Bytes that one rank holds for a model, beside its activations."""

    weights: float
    optimizer: float = 0.0
    """Master weights and both moments."""
    gradients: float = 0.0
    """Accumulated gradients."""
    gradients_stay: bool = False
    """Whether the gradients' memory is held all the time, as by ZeRO-3, or only in training."""
    bucket: float = 0.0
    """DeepSpeed's buffer of gradients to reduce, held as long as the gradients."""
    step: float = 0.0
    """Further memory during an optimizer step: gradients in fp32, and Adam's temporary tensors."""
    gathered: float = 0.0
    """Parameters that ZeRO-3 has gathered during a pass."""
    host: float = 0.0
    """Bytes in host memory: what is offloaded, with fp32 gradients."""


def frozen_states(parameters: int, engine: EngineConfig, *, ranks: int) -> ModelStates:
    """States of a model that is never trained: B P, or B P/N under ZeRO-3 on several ranks.

    Args:
        parameters: number of parameters.
        engine: settings of the engine.
        ranks: number of ranks.
    """
    size = BYTES[engine.dtype] * parameters
    if engine.zero_stage < 3 or ranks == 1:
        return ModelStates(weights=size)
    gathered = min(size, BYTES[engine.dtype] * REUSE)
    if engine.offload == "all":
        return ModelStates(weights=0.0, host=size / ranks, gathered=gathered)
    return ModelStates(weights=size / ranks, gathered=gathered)


def trained_states(
    parameters: int,
    largest: int,
    engine: EngineConfig,
    *,
    ranks: int,
    device: str = "cuda",
) -> ModelStates:
    """States of a model that is trained with AdamW.

    Bytes per rank of weights + gradients + optimizer states, and during the step:

        stage 0   B P + B P + 12 P (8 P in fp32, which needs no master weights)    4 P in bf16
        stage 1   B P + B P + 12 P/N                                               4 P/N
        stage 2   B P + B P/N + 12 P/N                                             4 P/N
        stage 3   B P/N + B P/N + 12 P/N                                           4 P/N

    With the optimizer offloaded, 12 P/N and 4 P/N for gradients in fp32 lie in host memory, and
    gradients in the dtype as well; with everything offloaded, the weights too.

    Args:
        parameters: number of parameters.
        largest: those of the largest matrix.
        engine: settings of the engine.
        ranks: number of ranks.
        device: cuda; or cpu, where untouched parts of a bucket take no memory and AdamW is not
            fused.

    Source: arXiv 1910.02054, section 5, with the fp32 gradients of DeepSpeed's step.
    """
    size = BYTES[engine.dtype]
    stage = engine.zero_stage
    share = parameters / ranks
    cpu = device == "cpu"
    bucket = size * (min(BUCKET, parameters) if cpu else BUCKET)
    if stage == 0:
        states = _unsharded(parameters, largest, size, bucket, cpu=cpu)
    else:
        sharded_gradients = stage >= 2
        stepped = min(share, SUBGROUP) if stage == 3 else share
        states = ModelStates(
            weights=size * (share if stage == 3 else parameters),
            optimizer=12 * share,
            gradients=size * (share if sharded_gradients else parameters),
            gradients_stay=stage == 3,
            bucket=bucket,
            step=(12 if cpu else 4) * stepped,
            gathered=size * min(parameters, REUSE + largest) if stage == 3 and ranks > 1 else 0.0,
        )
    return _offloaded(states, engine, parameters, largest, ranks=ranks)


def _unsharded(
    parameters: int,
    largest: int,
    size: int,
    bucket: float,
    *,
    cpu: bool,
) -> ModelStates:
    mixed = size < 4
    temporary = 8 * largest if cpu else 0
    return ModelStates(
        weights=size * parameters,
        optimizer=(12 if mixed else 8) * parameters,
        gradients=size * parameters,
        # gradients are flattened in buckets after the last backward pass
        step=max((4 * parameters if mixed else 0) + temporary, min(bucket, size * parameters)),
    )


def _offloaded(
    states: ModelStates,
    engine: EngineConfig,
    parameters: int,
    largest: int,
    *,
    ranks: int,
) -> ModelStates:
    if engine.offload == "none":
        return states
    size = BYTES[engine.dtype]
    share = parameters / ranks
    stage = engine.zero_stage
    # fp32 gradients and accumulated ones; stages 1 and 2 keep a copy of the new weights too
    host = (16 + size + (size if stage < 3 else 0)) * share
    weights = states.weights
    if engine.offload == "all":
        host += weights
        weights = 0.0
    return replace(
        states,
        weights=weights,
        optimizer=0.0,
        gradients=size * (parameters if stage == 1 else 0),
        gradients_stay=False,
        bucket=states.bucket + (size * largest if stage < 3 else 0),
        step=0.0,
        gathered=size * min(parameters, REUSE + largest) if stage == 3 else 0.0,
        host=host,
    )
