"""Multiple-choice questions in the published evaluation format, and their options in another order. Pure but for reading."""

from __future__ import annotations

import json
import random
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.text.data import load_rows

MIN_OPTIONS, MAX_OPTIONS = 2, 14


@dataclass(frozen=True, kw_only=True)
class Question:
    """An exam question with its options and the letter of the right one."""

    id: str
    """the item's own `id`, or source-number; unique within its source"""
    source: str
    question: str
    options: dict[str, str]
    """letter -> text, 2 to 14 of them, in the file's order"""
    answer_idx: str
    index: int
    """the item's number in its list of the file, from 0"""
    file: str


def load_questions(sources: str, *, limit: int | None = None) -> tuple[list[Question], list[str]]:
    """The questions of the comma-separated files, in order, and one line for each malformed item, which is left out.

    A .json file holds {"source": [items]}, or a list, whose source is the file's name; JSONL, Parquet, folders of `datasets`
    and hub ids are read as lists. An item has `question`, `options` (letter -> text), `answer_idx`, and perhaps `answer` and
    `id`. `answer_idx` decides: an `answer` that is another option's text makes the item malformed, one that is none of the
    options gives a warning. `limit` takes the first items of each source in each file.
    Raises ValueError for what cannot be read, and when no question is left.
    """
    questions: list[Question] = []
    bad: list[str] = []
    unlike: list[str] = []
    seen: set[tuple[str, str]] = set()
    num_before: Counter[str] = Counter()
    for file in (part.strip() for part in sources.split(",")):
        for source, items in _read(file).items():
            for index, item in enumerate(items[:limit]):
                where = f"{file}: {source} item {index}"
                problem = _problem(item)
                own = (
                    f"{source}-{num_before[source] + index}"
                    if problem or item.get("id") is None
                    else str(item["id"])
                )
                if problem is None and (source, own) in seen:
                    problem = f"id {own!r} is used twice"
                if problem:
                    bad.append(f"{where}: {problem}")
                    continue
                seen.add((source, own))
                if _plain(item.get("answer") or "") not in ("", *_names(item, item["answer_idx"])):
                    unlike.append(where)
                fields = {key: item[key] for key in ("question", "options", "answer_idx")}
                questions.append(Question(id=own, source=source, index=index, file=file, **fields))
            num_before[source] += len(items)
    if not questions:
        raise ValueError(
            f"data {sources!r} holds no questions" + (f"; malformed: {bad[0]}" if bad else "")
        )
    if unlike:
        text = f"{unlike[0]}: its answer is none of its options ({len(unlike)} such items): answer_idx counts"
        warnings.warn(text, stacklevel=2)
    return questions, bad


def _read(file: str) -> dict[str, list[Any]]:
    path = Path(file).expanduser()
    if path.suffix != ".json" or not path.is_file():
        return {path.stem: list(load_rows(file))}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"data {file}: not valid JSON: {error}") from None
    content = {path.stem: content} if isinstance(content, list) else content
    if not isinstance(content, dict) or not all(
        isinstance(items, list) for items in content.values()
    ):
        raise ValueError(f'data {file}: expected {{"source": [items]}} or a list of items')
    return content


def _problem(item: Any) -> str | None:
    """What makes the item unusable, if anything."""
    if not isinstance(item, dict):
        return f"is {type(item).__name__}, expected an object"
    question, options, letter = item.get("question"), item.get("options"), item.get("answer_idx")
    if not isinstance(question, str) or not question.strip():
        return "its question is missing or empty"
    if not isinstance(options, dict) or not options:
        return "has no options: give an object, letter -> text"
    if not MIN_OPTIONS <= len(options) <= MAX_OPTIONS:
        return f"has {len(options)} options, expected {MIN_OPTIONS} to {MAX_OPTIONS}"
    for key, text in options.items():
        if not (len(key) == 1 and "A" <= key <= "Z"):
            return f"option {key!r}: expected a letter from A to Z"
        if not isinstance(text, str) or not text.strip():
            return f"option {key} is {text!r}, expected text"
    try:
        "".join((question, *options.values())).encode()
    except UnicodeEncodeError:
        return "holds half a character (a lone surrogate), which no tokenizer takes"
    if not isinstance(letter, str) or letter not in options:
        return f"answer_idx {letter!r} is not among the options {', '.join(options)}"
    answer = "" if item.get("answer") is None else item["answer"]
    if not isinstance(answer, str):
        return f"answer is {type(answer).__name__}, expected text"
    others = {name for key in options if key != letter for name in _names(item, key)}
    if _plain(answer) in others - {*_names(item, letter)}:
        return f"answer_idx {letter} and answer {answer[:60]!r} name different options"
    return None


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _names(item: dict[str, Any], letter: str) -> tuple[str, str]:
    return _plain(item["options"][letter]), letter.casefold()


def permutation(question: Question, seed: int) -> dict[str, str]:
    """Letter shown -> letter of the question, for the order that `permuted` gives: how an answer is mapped back."""
    letters = list(question.options)
    drawn = random.Random(f"{seed}/{question.source}/{question.id}").sample(letters, len(letters))
    return dict(zip(letters, drawn, strict=True))


def permuted(question: Question, seed: int) -> Question:
    """The same question with its option texts in a seeded order under the same letters; `answer_idx` follows its text."""
    back = permutation(question, seed)
    options = {shown: question.options[own] for shown, own in back.items()}
    (answer_idx,) = [shown for shown, own in back.items() if own == question.answer_idx]
    return replace(question, options=options, answer_idx=answer_idx)
