"""Sending the policy's weights to the sampler, and the parity gate that each update must pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from ..core.sampling.process_sampler import ProcessSampler
from ..core.sampling.sampler import Sampler, ServedSampler
from ..core.training.packing import PackedBatch, pack
from .config import PPOConfig
from .experience import compute
from .setup import Components

TOLERANCE = {"fp32": 1e-4, "bf16": 0.5}
"""Largest difference of log-probs in nats that rounding explains, by dtype.

In bf16 a small model's differed by 0.01 on average and up to 0.2, as much as the weights of a few
steps before: there `check_taken` sees what this gate cannot.
"""
NUM_SEQUENCES = 4
"""Sequences of the gate."""
MAX_TOKENS = 128
"""Tokens of a sequence of the gate."""

GateLogprobs = tuple[Tensor, list[list[float]]]
"""Log-probs of the gate: the trainer's [tokens]; a copy's by sequence, from the second token on."""


class GateSequence(NamedTuple):
    """A fixed sequence of the gate; every token after the first counts."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]


def push_weights(config: PPOConfig, run: Components, version: int) -> dict[str, float]:
    """Sends the policy's weights to the sampler.

    A sampler whose weights live in other processes must pass the parity gate: for the first
    training prompts, each copy's log-probs must agree with the trainer's, and change with them.

    Returns:
        Metrics of the update.

    Raises:
        RuntimeError: a copy fails the gate; raised on every rank.
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
    """The first tokens of the first prompts, as the gate's sequences."""
    fixed = [ids[:MAX_TOKENS] for ids in token_ids if len(ids) > 1][:NUM_SEQUENCES]
    return pack([GateSequence(prompt_ids=ids[:1], response_ids=ids[1:]) for ids in fixed])


def parity_gap(
    ours: Tensor,
    batch: PackedBatch,
    theirs: list[list[float]],
    *,
    name: str,
    limit: float,
) -> float:
    """Largest difference between the trainer's and a copy's log-probs.

    Args:
        ours: [tokens], the trainer's.
        batch: the gate's sequences.
        theirs: the copy's, by sequence, from the second token on.
        name: the copy, for errors.
        limit: largest difference allowed, in nats.

    Raises:
        RuntimeError: a difference is over the limit.
    """
    gaps = [
        (math.inf if math.isnan(a - b) else abs(a - b), number, index, a, b)
        for number, (own, copy) in enumerate(zip(ours.split(batch.lengths), theirs, strict=True))
        for index, (a, b) in enumerate(zip(own[1:].tolist(), copy, strict=True), start=1)
    ]
    gap, number, index, a, b = max(gaps)
    if gap > limit:
        raise RuntimeError(
            f"{name} does not hold the trainer's weights: token {index} of gate sequence {number} "
            f"has log-prob {b:.6f} there, {a:.6f} in the trainer, a gap of {gap:.2g} over "
            f"sampler.parity_tolerance={limit:g} (or its dtype or shape differs)"
        )
    return gap


def check_taken(before: GateLogprobs | None, now: GateLogprobs, *, name: str) -> None:
    """Checks that a copy's log-probs changed if the trainer's did.

    Rounding makes any change of the weights show in nearly every token.

    Raises:
        RuntimeError: the copy's are the same to the last bit, although the trainer's changed.
    """
    if before is None:
        return
    moved = float((now[0] != before[0]).float().mean())
    if moved > 0.5 and now[1] == before[1]:
        raise RuntimeError(
            f"{name} did not take the trainer's weights: its log-probs are those from before the "
            f"update, to the last bit, while {moved:.0%} of the trainer's moved, by up to "
            f"{float((now[0] - before[0]).abs().max()):.2g}"
        )


def sleep(config: PPOConfig, sampler: Sampler) -> None:
    """Lets the sampler release its memory until the next update, if `sampler.sleep` is set."""
    if config.sampler.sleep:
        assert isinstance(sampler, ServedSampler)
        sampler.sleep()


def close(sampler: Sampler) -> None:
    """Releases what the run holds on the sampler's servers, and ends a sampling process."""
    if isinstance(sampler, (ServedSampler, ProcessSampler)):
        sampler.close()
