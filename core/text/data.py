"""Reads rows from files and data sets; checks, splits and orders them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..files import check_regular, is_path, parse_json, read_file

QUESTION_KEY = "Open-ended Verifiable Question"
ANSWER_KEY = "Ground-True Answer"

Row = dict[str, Any]
Purpose = Literal["train", "validation", "test"]
SPLITS: dict[Purpose, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev", "eval", "test"),
    "test": ("test", "validation", "valid", "dev", "eval"),
}
"""Names of splits that serve a purpose, the best first."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question whose answer can be verified."""

    question: str
    answer: str
    index: int
    """Row number in the data, from 0; part of the seed of every sample drawn for the problem."""


def load_rows(sources: str, *, limit: int | None = None, purpose: Purpose = "train") -> list[Row]:
    """Reads the rows of one or more data sources.

    Args:
        sources: comma-separated; each is a .json file (a list of objects, or an object of such
            lists), a .jsonl or .parquet file, a folder saved by `datasets`, or a hub id. A split is
            named as FOLDER:SPLIT, subset and split of a hub id as ID:SUBSET:SPLIT.
        limit: maximum number of rows of each source; None for all.
        purpose: which split is read where none is named: see SPLITS.

    Returns:
        The rows, in the order of the sources.

    Raises:
        ValueError: a source cannot be read; the message names the file, and the row or line.
    """
    rows: list[Row] = []
    for source in sources.split(","):
        if not source.strip():
            raise ValueError(f"data {sources!r} has an empty entry: remove the stray comma")
        rows += _load_source(source.strip(), purpose)[:limit]
    if not rows:
        raise ValueError(f"data {sources!r} holds no rows")
    return rows


def _load_source(source: str, purpose: Purpose) -> list[Row]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _explained(path, lambda: _load_folder(path, "", purpose))
    if not path.exists():
        folder, _, split = source.rpartition(":")
        saved = Path(folder).expanduser()
        if folder and saved.is_dir():
            return _explained(saved, lambda: _load_folder(saved, split, purpose))
        name = source.partition(":")[0]
        if Path(name).suffix or is_path(name) or "/" not in name:
            raise ValueError(f"data {source}: no such file")
        return _without_nulls(_load_hub(source, purpose))
    if path.suffix == ".parquet":
        return _explained(path, lambda: _load_parquet(path))
    if path.suffix == ".json":
        rows = _load_json(path)
    elif path.suffix == ".jsonl":
        lines = read_file(path, name="data").split(b"\n")
        rows = [
            parse_json(line, where=f"data {path}: line {number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    else:
        raise ValueError(
            f"data {source}: cannot read {path.suffix or 'a file without suffix'}: give .json, "
            ".jsonl, .parquet, a folder saved by datasets, or a hub id"
        )
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise ValueError(f"data {path}: row {number} is {kind}, expected an object")
    return rows


def _explained(path: Path, load: Callable[[], Iterable[Row]]) -> list[Row]:
    """The rows of a table; whatever a damaged one raises becomes a ValueError with its path."""
    try:
        return _without_nulls(load())
    except Exception as error:  # pyarrow and datasets raise errors of a dozen types
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if reason.startswith("data "):
            raise
        raise ValueError(f"data {path}: cannot be read: {reason}") from None


def _load_json(path: Path) -> list[Any]:
    content = load_json(path)
    if isinstance(content, list):
        return content
    parts = content.values() if isinstance(content, dict) else []
    if not parts or not all(isinstance(part, list) for part in parts):
        kind = type(content).__name__
        raise ValueError(f"data {path}: expected a list of objects, got {kind}")
    return [row for part in parts for row in part]


def load_json(path: Path) -> Any:
    """The content of a data file in JSON.

    Raises:
        ValueError: it is no regular file, or not valid JSON; the message names it.
    """
    return parse_json(read_file(path, name="data"), where=f"data {path}")


def _load_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    check_regular(path, name="data")
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data {path}: not a Parquet file: {str(error).splitlines()[0]}") from None


def _load_folder(path: Path, split: str, purpose: Purpose) -> Iterable[Row]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise ValueError(f"data {path}: a folder, but not one saved by datasets") from None
    return _select_split(loaded, split, purpose, source=str(path))


def _load_hub(source: str, purpose: Purpose = "train") -> Iterable[Row]:
    import datasets

    name, subset, split, *_ = (*source.split(":"), "", "")
    try:
        loaded = datasets.load_dataset(name, subset or None)
    except Exception as error:  # a dozen kinds, each of which means that the name cannot be loaded
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        subsets = _subsets(name)
        if subsets and subset not in subsets:
            names = ", ".join(subsets)
            raise ValueError(
                f"data {source}: has the subsets {names}: name one, as in {name}:{subsets[0]}"
            ) from None
        raise ValueError(
            f"data {source}: neither a file nor a hub data set that can be loaded: {reason}"
        ) from None
    return _select_split(loaded, split, purpose, source=source)


def _subsets(name: str) -> list[str]:
    """Names of a hub data set's subsets; empty if it cannot be read."""
    import datasets

    try:
        return datasets.get_dataset_config_names(name)
    except Exception:  # such as no connection
        return []


def _select_split(
    loaded: Any,
    split: str,
    purpose: Purpose,
    *,
    source: str,
) -> Iterable[Row]:
    """The rows of the named split, or of the one that serves the purpose."""
    import datasets

    splits: Any = loaded if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    if split in splits:
        return splits[split]
    if split == "" and len(splits) == 1:
        return next(iter(splits.values()))
    found = [name for name in SPLITS[purpose] if name in splits]
    if split or not found:
        sought = split or " or ".join(SPLITS[purpose])
        example = f"{source.partition(':')[0]}:{next(iter(splits))}"
        raise ValueError(
            f"data {source}: no split {sought} among {', '.join(splits) or 'one'}: name one, as in "
            f"{example}"
        )
    return splits[found[0]]


def _without_nulls(rows: Iterable[Row]) -> list[Row]:
    """Removes the nulls by which a table fills up objects that lack a key, at every depth."""
    return [_prune(row) for row in rows]


def _prune(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _prune(part) for key, part in value.items() if part is not None}
    return [_prune(part) for part in value] if isinstance(value, list) else value


def text_field(row: Row, key: str, *, where: str) -> str:
    """Reads a text of a row.

    Args:
        row: the row.
        key: key of the text.
        where: name of the row in error messages.

    Raises:
        ValueError: the value is missing, blank, not text, or cannot be encoded as UTF-8.
    """
    if key not in row:
        keys = ", ".join(sorted(map(str, row)))
        raise ValueError(f"{where}: no key {key!r}; it has {keys[:200]}")
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} is {type(value).__name__}, expected text")
    if not value.strip():
        raise ValueError(f"{where}: {key!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {key!r} holds an unpaired surrogate") from None
    return value


def load_problems(
    sources: str,
    *,
    limit: int | None = None,
    question_key: str = QUESTION_KEY,
    answer_key: str = ANSWER_KEY,
    purpose: Purpose = "train",
) -> list[Problem]:
    """Reads verifiable problems.

    Args:
        sources: as for `load_rows`.
        limit: as for `load_rows`.
        question_key: key of the question in each row.
        answer_key: key of the reference answer in each row.
        purpose: as for `load_rows`.

    Raises:
        ValueError: a source cannot be read, or a text is missing; the message names row and key.
    """
    problems = []
    for index, row in enumerate(load_rows(sources, limit=limit, purpose=purpose)):
        where = f"data {sources}: row {index}"
        question = text_field(row, question_key, where=where)
        answer = text_field(row, answer_key, where=where)
        problems.append(Problem(question=question, answer=answer, index=index))
    return problems


def split(num: int, *, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits rows into training and evaluation rows, by a seeded draw without replacement.

    Args:
        num: number of rows.
        fraction: share of the rows to evaluate on.
        seed: seed of the draw; equal seeds give equal splits.

    Returns:
        The row numbers for training and those for evaluation, each in ascending order.

    Raises:
        ValueError: either part would be empty, although the fraction is not 0.
    """
    num_eval = round(num * fraction)
    if fraction != 0.0 and not 0 < num_eval < num:
        raise ValueError(
            f"eval_fraction={fraction} of {num} rows leaves {num - num_eval} to train on and "
            f"{num_eval} to evaluate: change it or give eval_data"
        )
    order = np.random.default_rng((seed, 0x5EED)).permutation(num)
    return sorted(order[num_eval:].tolist()), sorted(order[:num_eval].tolist())


class Order:
    """An endless order of items, with a new seeded permutation in every epoch.

    `position`, the number of items taken so far, is its whole state.
    """

    def __init__(
        self,
        num: int,
        *,
        seed: int,
        position: int = 0,
    ) -> None:
        """Args:
        num: number of items.
        seed: seed of the permutations.
        position: where to continue.
        """
        self.num = num
        self.seed = seed
        self.position = position

    def take(self, count: int) -> list[int]:
        """Returns the numbers of the next `count` items and advances."""
        taken: list[int] = []
        while len(taken) < count:
            epoch, offset = divmod(self.position, self.num)
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num)
            part = order[offset : offset + count - len(taken)].tolist()
            taken += part
            self.position += len(part)
        return taken
