"""Rows from JSON, JSONL, Parquet, `datasets` folders and hub data sets; checked, split and ordered by seed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

QUESTION_KEY = "Open-ended Verifiable Question"
ANSWER_KEY = "Ground-True Answer"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question whose answer can be checked."""

    question: str
    answer: str
    index: int
    """its row's number in the data, from 0: part of the seed of every draw made for it"""


def load_rows(sources: str, *, limit: int | None = None) -> list[dict[str, Any]]:
    """All rows of the comma-separated sources, in order; the first `limit` of each when given.

    A source is a .json (a list of objects, or an object of such lists), .jsonl or .parquet file, a folder saved by
    `datasets`, or a hub id.
    Raises ValueError naming the file, and the row or line, for anything that cannot be read.
    """
    rows: list[dict[str, Any]] = []
    for source in (part.strip() for part in sources.split(",")):
        if not source:
            raise ValueError(f"data {sources!r} has an empty entry: remove the stray comma")
        found = _load_source(source)
        rows += found[:limit]
    if not rows:
        raise ValueError(f"data {sources!r} holds no rows")
    return rows


def _load_source(source: str) -> list[dict[str, Any]]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path)
    if not path.exists():
        if path.suffix or source.startswith((".", "/", "~")) or source.count("/") != 1:
            raise ValueError(f"data {source}: no such file")
        return _load_hub(source)
    if path.suffix == ".json":
        return _load_json(path)
    if path.suffix == ".jsonl":
        return _load_jsonl(path)
    if path.suffix == ".parquet":
        return _load_parquet(path)
    raise ValueError(
        f"data {source}: cannot read {path.suffix or 'a file without suffix'}: give .json, .jsonl, .parquet, "
        "a folder saved by datasets, or a hub id"
    )


def _load_json(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"data {path}: not valid JSON: {error}") from None
    if (
        isinstance(content, dict)
        and content
        and all(isinstance(part, list) for part in content.values())
    ):
        content = [row for part in content.values() for row in part]
    if not isinstance(content, list):
        raise ValueError(f"data {path}: expected a list of objects, got {type(content).__name__}")
    return _checked_objects(content, path)


def _load_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line.decode("utf-8-sig")))
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    raise ValueError(
                        f"data {path}: line {number} is not valid JSON: {error}"
                    ) from None
    return _checked_objects(rows, path)


def _load_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return [_present(row) for row in pyarrow.parquet.read_table(path).to_pylist()]
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data {path}: not a Parquet file: {str(error).splitlines()[0]}") from None


def _load_folder(path: Path) -> list[dict[str, Any]]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise ValueError(f"data {path}: a folder, but not one saved by datasets") from None
    parts = loaded.values() if isinstance(loaded, datasets.DatasetDict) else [loaded]
    return [_present(row) for part in parts for row in part]


def _load_hub(name: str) -> list[dict[str, Any]]:
    import datasets

    try:
        return [_present(row) for row in datasets.load_dataset(name, split="train")]
    except (
        Exception
    ) as error:  # the hub client raises a dozen kinds; each means: this name cannot be had
        reason = str(error).splitlines()[0][:200]
        raise ValueError(
            f"data {name}: neither a file nor a hub data set that can be loaded: {reason}"
        ) from None


def _present(row: dict[str, Any]) -> dict[str, Any]:
    """Without the nulls by which a table says that the object in a cell lacks a key, such as a fifth option."""
    return {
        key: {name: part for name, part in cell.items() if part is not None}
        if isinstance(cell, dict)
        else cell
        for key, cell in row.items()
    }


def _checked_objects(content: list[Any], path: Path) -> list[dict[str, Any]]:
    for number, row in enumerate(content):
        if not isinstance(row, dict):
            raise ValueError(
                f"data {path}: row {number} is {type(row).__name__}, expected an object"
            )
    return content


def text_field(row: dict[str, Any], key: str, *, where: str) -> str:
    """A row's text under `key`. Raises ValueError when it is missing, not text, or blank, naming the place and the key."""
    if key not in row:
        raise ValueError(
            f"{where}: no key {key!r}; it has {', '.join(sorted(map(str, row)))[:200]}"
        )
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} is {type(value).__name__}, expected text")
    if not value.strip():
        raise ValueError(f"{where}: {key!r} is empty")
    if not value.isascii() and value != value.encode(errors="ignore").decode():
        raise ValueError(f"{where}: {key!r} holds half of a character (a lone surrogate)")
    return value


def load_problems(
    sources: str,
    *,
    limit: int | None = None,
    question_key: str = QUESTION_KEY,
    answer_key: str = ANSWER_KEY,
) -> list[Problem]:
    """Verifiable problems in the published format. Raises ValueError naming the row and the key that is missing or empty."""
    return [
        Problem(
            question=text_field(row, question_key, where=f"data {sources}: row {index}"),
            answer=text_field(row, answer_key, where=f"data {sources}: row {index}"),
            index=index,
        )
        for index, row in enumerate(load_rows(sources, limit=limit))
    ]


def split(num: int, *, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers for training and for evaluation: a seeded draw without replacement, the same on every rank.

    Raises ValueError when either part would be empty though a fraction was asked for.
    """
    if fraction == 0.0:
        return list(range(num)), []
    num_eval = round(num * fraction)
    if not 0 < num_eval < num:
        raise ValueError(
            f"eval_fraction={fraction} of {num} rows leaves {num - num_eval} to train on and {num_eval} to "
            "evaluate: change it or give eval_data"
        )
    order = np.random.default_rng((seed, 0x5EED)).permutation(num)
    return sorted(order[num_eval:].tolist()), sorted(order[:num_eval].tolist())


class Order:
    """An endless order over `num` items: a fresh seeded permutation every epoch. Its whole state is `position`, so a
    resumed run goes on with the very next item."""

    def __init__(self, num: int, *, seed: int, position: int = 0) -> None:
        self.num, self.seed, self.position = num, seed, position

    def take(self, count: int) -> list[int]:
        """The next `count` item numbers; moves on."""
        taken: list[int] = []
        while len(taken) < count:
            epoch, offset = divmod(self.position, self.num)
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num)
            part = order[offset : offset + count - len(taken)].tolist()
            taken += part
            self.position += len(part)
        return taken
