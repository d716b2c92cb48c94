"""Rollouts kept on disk: a compressed file for each step of a PPO run."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.files import parse_json, read_file, replace_bytes
from ..core.text.data import text_field
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
        A row for each rollout, in their order. Lists of numbers have one for each response token
        (`sampler_logprobs`: for each that the policy wrote), as the shortest decimals that give the
        same fp32. NaN and infinity become null.
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
            "response_mask": _booleans(rollout.response_mask),
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


def _booleans(mask: Sequence[bool] | None) -> list[bool] | None:
    return None if mask is None else [bool(trained) for trained in mask]


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


@dataclass(frozen=True, kw_only=True)
class StoredRollout:
    """What a critic learns from: the tokens of a rollout, and their rewards."""

    question: str
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    response_mask: Sequence[bool] | None = None
    """Which of the response the policy wrote; None: all of it."""
    rewards: Sequence[float]
    """Reward of each response token."""


def load_stored(
    sources: str,
    *,
    limit: int | None,
    max_tokens: int,
    vocabulary: int,
) -> list[StoredRollout]:
    """Reads kept rollouts; those without a verdict are left out.

    Args:
        sources: comma-separated folders of `write_step`, or files of such folders.
        limit: maximum number of rollouts of each source; None for all.
        max_tokens: tokens that a rollout may have.
        vocabulary: number of token ids.

    Raises:
        ValueError: a source cannot be read, a row is invalid or too long, or no row has a verdict;
            the message names file and line.
    """
    rollouts: list[StoredRollout] = []
    for source in sources.split(","):
        lines = chain.from_iterable(map(_lines, _files(source.strip())))
        for where, line in islice(lines, limit):
            row = parse_json(line, where=where)
            if not isinstance(row, dict) or "rewards" not in row:
                raise ValueError(f"{where}: no object with the key 'rewards'")
            if row["rewards"] is None:
                continue
            rollout = _stored(row, where=where, vocabulary=vocabulary)
            length = len(rollout.prompt_ids) + len(rollout.response_ids)
            if length > max_tokens:
                raise ValueError(
                    f"{where}: {length} tokens, over max_tokens_per_gpu={max_tokens}: raise it"
                )
            rollouts.append(rollout)
    if not rollouts:
        raise ValueError(f"data {sources}: no rollout has a verdict")
    return rollouts


def _files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    files = sorted(path.glob("step-*.jsonl.gz")) if path.is_dir() else [path]
    if not source or not files:
        raise ValueError(
            f"data {source}: no step-*.jsonl.gz in it: give the rollouts folder of a run of "
            "`verippo ppo --keep_rollouts true`"
        )
    return files


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a file, each with its name in errors."""
    data = read_file(path, name="data")
    try:
        text = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"data {path}: cannot be decompressed: {error}") from None
    for number, line in enumerate(text.splitlines(), start=1):
        yield f"data {path}: line {number}", line


def _stored(row: dict[str, Any], *, where: str, vocabulary: int) -> StoredRollout:
    problem = row.get("problem")
    question = text_field(problem if isinstance(problem, dict) else {}, "question", where=where)
    prompt = _token_ids(row, "prompt_ids", where=where, vocabulary=vocabulary)
    response = _token_ids(row, "response_ids", where=where, vocabulary=vocabulary)
    rewards = row["rewards"]
    numeric = isinstance(rewards, list) and all(type(x) in (int, float) for x in rewards)
    if not numeric or len(rewards) != len(response) or not all(map(math.isfinite, rewards)):
        raise ValueError(f"{where}: rewards must be a finite number for each response token")
    mask = row.get("response_mask")
    if mask is not None and (
        not isinstance(mask, list)
        or len(mask) != len(response)
        or not all(type(trained) is bool for trained in mask)
        or not any(mask)
    ):
        raise ValueError(
            f"{where}: response_mask must be null, or a boolean for each response token, at least "
            "one of them true"
        )
    return StoredRollout(
        question=question,
        prompt_ids=prompt,
        response_ids=response,
        response_mask=mask,
        rewards=array("f", rewards),
    )


def _token_ids(
    row: dict[str, Any],
    key: str,
    *,
    where: str,
    vocabulary: int,
) -> array[int]:
    ids = row.get(key)
    whole = isinstance(ids, list) and all(type(token) is int for token in ids)
    if not whole or not ids or min(ids) < 0 or max(ids) >= vocabulary:
        raise ValueError(
            f"{where}: {key} must be token ids under {vocabulary}, the vocabulary of the model"
        )
    return array("i", ids)


def _file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.jsonl.gz"
