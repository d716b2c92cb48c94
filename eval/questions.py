"""Reads multiple-choice questions in the published format, and permutes their options."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.text.data import load_json, load_rows

MIN_OPTIONS = 2
MAX_OPTIONS = 14


@dataclass(frozen=True, kw_only=True)
class Question:
    """An exam question with its options and the letter of the correct one."""

    id: str
    """The item's own `id`, or source-number; unique within its source."""
    source: str
    question: str
    options: dict[str, str]
    """Letter -> text of each option, in the file's order."""
    gold: str
    """Letter of the correct option."""
    index: int
    """Position of the item in its source's list, from 0."""
    file: str

    @property
    def where(self) -> str:
        """Name of the item in messages."""
        return f"{self.file}: {self.source} item {self.index}"


def load_questions(
    sources: str,
    *,
    limit: int | None = None,
) -> tuple[list[Question], list[str]]:
    """Reads the questions of one or several files.

    A .json file holds {"source": [items]}, or a list whose source is the file's name; JSONL,
    Parquet, folders saved by `datasets` and hub ids are read as lists. An item has `question`,
    `options` (letter -> text), `answer_idx`, and optionally `answer` (text) and `id`. An item whose
    `answer` names another option than `answer_idx` is malformed; an `answer` that names no option
    gives a warning.

    Args:
        sources: Comma-separated files.
        limit: Maximum number of items taken from each source of each file; None takes all.

    Returns:
        The questions in the order of the files, and one line for each malformed item.

    Raises:
        ValueError: a file cannot be read, or there are no questions.
    """
    questions: dict[tuple[str, str], Question] = {}
    malformed: list[str] = []
    unmatched: list[str] = []
    for file, source, index, number, item in _items(sources, limit):
        where = f"{file}: {source} item {index}"
        if problem := _problem(item):
            malformed.append(f"{where}: {problem}")
            continue
        own = item.get("id")
        question = Question(
            id=f"{source}-{number}" if own is None else str(own),
            source=source,
            question=item["question"],
            options=item["options"],
            gold=item["answer_idx"],
            index=index,
            file=file,
        )
        if questions.setdefault((source, question.id), question) is not question:
            malformed.append(f"{where}: id {question.id!r} is used twice")
        elif (item.get("answer") or "").strip() and not _named(item):
            unmatched.append(where)
    if not questions:
        reason = f"; malformed: {malformed[0]}" if malformed else ""
        raise ValueError(f"data {sources!r} holds no questions{reason}")
    if unmatched:
        warnings.warn(
            f"{unmatched[0]}: its answer is none of its options ({len(unmatched)} such items): "
            "answer_idx is used",
            stacklevel=2,
        )
    return list(questions.values()), malformed


def _items(sources: str, limit: int | None) -> Iterator[tuple[str, str, int, int, Any]]:
    """Yields (file, source, position in the file's list, number in the source, item)."""
    num_before: Counter[str] = Counter()
    for file in map(str.strip, sources.split(",")):
        for source, items in _read(file).items():
            for index, item in enumerate(items[:limit]):
                yield file, source, index, num_before[source] + index, item
            num_before[source] += len(items)


def _read(file: str) -> dict[str, list[Any]]:
    path = Path(file).expanduser()
    if path.suffix != ".json" or path.is_dir() or not path.exists():
        return {path.stem: list(load_rows(file, purpose="test"))}
    content = load_json(path)
    if isinstance(content, list):
        return {path.stem: content}
    if not isinstance(content, dict) or not all(isinstance(x, list) for x in content.values()):
        raise ValueError(f'data {file}: expected {{"source": [items]}} or a list of items')
    return content


def _problem(item: Any) -> str | None:
    """Describes what makes the item malformed; None for a good one."""
    if not isinstance(item, dict):
        return f"is {type(item).__name__}, expected an object"
    options = item.get("options")
    letter = item.get("answer_idx")
    answer = item.get("answer")
    if not _is_text(item.get("question")):
        return "its question is missing or empty"
    if not isinstance(options, dict) or not options:
        return "has no options: give an object, letter -> text"
    if not MIN_OPTIONS <= len(options) <= MAX_OPTIONS:
        return f"has {len(options)} options, expected {MIN_OPTIONS} to {MAX_OPTIONS}"
    for key, text in options.items():
        if not (len(key) == 1 and "A" <= key <= "Z"):
            return f"option {key!r}: expected a letter from A to Z"
        if not _is_text(text):
            return f"option {key} is {text!r}, expected text"
    try:
        "".join((item["question"], *options.values())).encode()
    except UnicodeEncodeError:
        return "contains an unpaired surrogate, which no tokenizer accepts"
    if not isinstance(letter, str) or letter not in options:
        return f"answer_idx {letter!r} is not among the options {', '.join(options)}"
    if not isinstance(answer, str | None):
        return f"answer is {type(answer).__name__}, expected text"
    if (named := _named(item)) and letter not in named:
        return f"answer_idx {letter} and answer {str(answer)[:60]!r} name different options"
    return None


def _named(item: dict[str, Any]) -> list[str]:
    """Letters of the options that the item's `answer` gives, as text or as a letter."""
    answer = _plain(item.get("answer") or "")
    options = item["options"].items()
    return [letter for letter, text in options if answer in (_plain(text), letter.casefold())]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def permute_options(question: Question, seed: int) -> tuple[Question, dict[str, str]]:
    """Puts the texts of the options in a random order under the same letters.

    Args:
        question: Question in the file's order.
        seed: Seed of the order, used together with the question's source and id.

    Returns:
        The question in the new order, and letter shown -> letter in `question`.
    """
    letters = list(question.options)
    drawn = random.Random(f"{seed}/{question.source}/{question.id}").sample(letters, len(letters))
    own_letters = dict(zip(letters, drawn, strict=True))
    options = {shown: question.options[own] for shown, own in own_letters.items()}
    gold = letters[drawn.index(question.gold)]
    return replace(question, options=options, gold=gold), own_letters
