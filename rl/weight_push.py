"""Weights on their way to the sampler, and the gate that each update must pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from ..core.sampling.sampler import Sampler, ServedSampler
from ..core.training.packing import PackedBatch, pack
from .config import PPOConfig
from .experience import compute
from .setup import Components

TOLERANCE = {"fp32": 1e-4, "bf16": 0.5}
"""nats: two correct implementations differ by rounding alone. With bf16 a small model's differed by 0.01 on average and up to
0.2, as much as by the weights of several steps before: there `check_taken` sees what this cannot"""
NUM_SEQUENCES = 4
MAX_TOKENS = 128


Answers = tuple[Tensor, list[list[float]]]
"""the gate's log-probs: the trainer's [tokens], and for each sequence a copy's, of its tokens from the second on"""


class GateSequence(NamedTuple):
    """A fixed sequence: every token after the first counts."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]


def push_weights(config: PPOConfig, run: Components, version: int) -> dict[str, float]:
    """Sends the policy's weights to the sampler and returns the metrics of the update.

    A sampler whose weights live elsewhere must pass the parity gate: for the first training prompts, each copy's log-probs
    agree with the trainer's, and moved when those did. Raises RuntimeError, on every rank, with both numbers where not.
    """
    run.sampler.update_weights(run.policy.named_tensors(), version)
    if not isinstance(run.sampler, ServedSampler):
        return {"weight_version": version}
    batch = gate_batch(run.train_set.token_ids)
    (ours,) = compute(partial(run.policy, temperature=1.0), batch, config.max_tokens_per_gpu)
    sequences = [ids.tolist() for ids in batch.tokens.split(batch.lengths)]
    limit = config.sampler.parity_tolerance or TOLERANCE[config.dtype]
    gaps = []
    for name, theirs in run.sampler.logprobs(sequences).items():
        gaps.append(parity_gap(ours, batch, theirs, name=name, limit=limit))
        check_taken(run.gate.get(name), (ours, theirs), name=name)
        run.gate[name] = ours, theirs
    return {"weight_version": version, "weight_parity_gap": max(gaps)}


def gate_batch(token_ids: Sequence[Sequence[int]]) -> PackedBatch:
    """The beginnings of the first prompts."""
    fixed = [ids[:MAX_TOKENS] for ids in token_ids if len(ids) > 1][:NUM_SEQUENCES]
    return pack([GateSequence(prompt_ids=ids[:1], response_ids=ids[1:]) for ids in fixed])


def parity_gap(
    ours: Tensor, batch: PackedBatch, theirs: list[list[float]], *, name: str, limit: float
) -> float:
    """The largest difference between the trainer's log-probs [tokens] and a copy's, of each sequence's tokens from the second
    on (nats). Raises RuntimeError when it is over the limit."""
    gaps = [
        (math.inf if math.isnan(a - b) else abs(a - b), number, index, a, b)
        for number, (own, copy) in enumerate(zip(ours.split(batch.lengths), theirs, strict=True))
        for index, (a, b) in enumerate(zip(own[1:].tolist(), copy, strict=True), start=1)
    ]
    gap, number, index, a, b = max(gaps)
    if gap > limit:
        raise RuntimeError(
            f"{name} does not hold the trainer's weights: token {index} of gate sequence {number} has log-prob {b:.6f} there, "
            f"{a:.6f} in the trainer, a gap of {gap:.2g} over sampler.parity_tolerance={limit:g} (or its dtype or shape differs)"
        )
    return gap


def check_taken(before: Answers | None, now: Answers, *, name: str) -> None:
    """Raises RuntimeError when the trainer's log-probs moved since the last update and a copy's are the same to the last bit:
    rounding makes any change of the weights show in nearly every token."""
    if before is None:
        return
    moved = float((now[0] != before[0]).float().mean())
    if moved > 0.5 and now[1] == before[1]:
        raise RuntimeError(
            f"{name} did not take the trainer's weights: its log-probs are those from before the update, to the last bit, "
            f"while {moved:.0%} of the trainer's moved, by up to {float((now[0] - before[0]).abs().max()):.2g}"
        )


def rest(config: PPOConfig, sampler: Sampler) -> None:
    """Between two rollouts the sampler gives its memory back, if it is to; the next update wakes it."""
    if config.sampler.sleep:
        assert isinstance(sampler, ServedSampler)
        sampler.sleep()


def close(sampler: Sampler) -> None:
    """Leaves nothing of the run in the sampler's servers."""
    if isinstance(sampler, ServedSampler):
        sampler.close()
