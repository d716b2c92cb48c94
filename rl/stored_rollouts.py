"""Rollouts kept on disk: a compressed file for each step of a PPO run."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.files import replace_bytes
from ..core.training.checkpoint import explain_full_disk
from .experience import Experience
from .rollout import Rollout

FOLDER = "rollouts"
"""Folder of the files in a run's output."""


def stored_rows(
    rollouts: Sequence[Rollout],
    scores: Tensor,
    trained: Sequence[Rollout],
    experience: Experience,
) -> list[dict[str, Any]]:
    """A step's rollouts with their scores and what the trainer computed for each token.

    Args:
        rollouts: all rollouts of the step.
        scores: [rollouts], NaN without a verdict.
        trained: those that the update is made of, in the order of the experience; the others have
            null in place of what the trainer computes.
        experience: log-probs, values and rewards of `trained`.

    Returns:
        A row for each rollout, in their order. Lists of numbers have one for each response token,
        as the shortest decimals that give the same fp32. NaN and infinity become null.
    """
    numbers = {id(rollout): number for number, rollout in enumerate(trained)}
    computed = {
        "logprobs": experience.logprobs,
        "ref_logprobs": experience.ref_logprobs,
        "values": experience.values,
        "rewards": experience.rewards,
    }
    rows = []
    for rollout, score in zip(rollouts, scores.tolist(), strict=True):
        number = numbers.get(id(rollout))
        sampled = Tensor(list(rollout.sampler_logprobs))
        row = {
            "problem": vars(rollout.problem),
            "prompt_ids": list(rollout.prompt_ids),
            "response_ids": list(rollout.response_ids),
            "text": rollout.text,
            "truncated": rollout.truncated,
            "sample": rollout.sample,
            "version": rollout.version,
            "score": score if math.isfinite(score) else None,
            "sampler_logprobs": _numbers(sampled),
        }
        for name, tensor in computed.items():
            response = None
            if number is not None:
                end = experience.batch.boundaries[number + 1]
                response = _numbers(tensor[end - len(rollout.response_ids) : end])
            row[name] = response
        rows.append(row)
    return rows


def _numbers(tensor: Tensor) -> list[float | None]:
    """Short decimals: float() of a tensor's own numbers would write the digits of a double."""
    texts = map(str, tensor.float().numpy())
    return [number if math.isfinite(number) else None for number in map(float, texts)]


def write_step(folder: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes the rows of a step in one piece; equal rows give equal bytes.

    Args:
        folder: folder of the files, made if it is missing.
        step: number of the step, from 1; a file of that step is replaced.
        rows: one for each rollout.

    Returns:
        Path of the file.

    Raises:
        ValueError: the disk is full.
    """
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    data = gzip.compress(lines.encode(), compresslevel=6, mtime=0)
    with explain_full_disk(folder, "the rollouts of a step"):
        return replace_bytes(_file(folder, step), data)


def discard_after(folder: Path, step: int) -> None:
    """Removes the files of later steps, which a resumed run repeats.

    Args:
        folder: folder of the files, which may be missing.
        step: number of the last finished step.
    """
    last = _file(folder, step).name
    for path in folder.glob("step-*.jsonl.gz"):
        if path.name > last:
            path.unlink()


def _file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.jsonl.gz"
