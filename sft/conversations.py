"""The forms in which training conversations are published, read into turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.text.chat import THINKING, THOUGHT_KEYS, parse_response, render_response
from ..core.text.data import Row, text_field

Turn = dict[str, str]
"""A message: role, content, and perhaps the thinking part under one of THOUGHT_KEYS."""

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}
_TURN_KEYS = {"role", "from", "content", "value", "weight", *THOUGHT_KEYS}
_UNSUPPORTED_ROW_KEYS = ("tools", "functions", "images")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Keys of a data row's texts."""

    question: str = "Question"
    """Key of the question."""
    thinking: str = "Complex_CoT"
    """Key of the reasoning before the answer; rows may lack it."""
    response: str = "Response"
    """Key of the final response."""


@dataclass(frozen=True, kw_only=True)
class AnswerColumns:
    """Keys of a labelled answer, from which the verifier learns."""

    response: str = "response"
    """Key of the response; rows may have a completion instead."""
    reference: str = "reference"
    """Key of the reference answer."""
    label: str = "label"
    """Key of the label: true or 1 for a right response, false or 0 for a wrong one."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The turns of a row; the last one is trained on."""

    turns: list[Turn]
    has_thinking: bool = True
    """Whether a row in Question / Complex_CoT / Response form has its reasoning."""
    skipped: bool = False
    """Whether the row says that its answer is not to be trained on (weight 0)."""


def read_conversation(
    row: Row,
    *,
    where: str,
    system: str | None = None,
    columns: Columns = Columns(),  # noqa: B008 immutable
) -> Conversation:
    """The conversation of one row.

    A row has one of these forms; `system` may stand beside any of them:

        messages                          turns of role and content
        conversations                     turns of from and value
        Question, Complex_CoT, Response   without or with a blank Complex_CoT: no reasoning
        prompt, completion                texts, or lists of turns
        instruction, input, output        input may be missing or blank

    Args:
        row: the row as loaded.
        where: source and row number, for errors.
        system: system turn of rows without one of their own.
        columns: keys of the third form.

    Raises:
        ValueError: the row has none of these forms, holds training content that would not be used,
            or its answer could not be told from its thinking again.
    """
    for key in _UNSUPPORTED_ROW_KEYS:
        if row.get(key):
            raise ValueError(f"{where}: {key!r} is not supported: remove it or the row")
    has_thinking = True
    skipped = False
    if "messages" in row or "conversations" in row:
        raw = row.get("messages") or row.get("conversations")
        turns = _turns(raw, where)
        skipped = isinstance(raw, list) and bool(raw) and raw[-1].get("weight", 1) == 0
    elif "prompt" in row and "completion" in row:
        turns = [
            *_turns_or_text(row, "prompt", "user", where),
            *_turns_or_text(row, "completion", "assistant", where),
        ]
    elif "instruction" in row and "output" in row:
        question = text_field(row, "instruction", where=where)
        if str(row.get("input") or "").strip():
            question += "\n\n" + text_field(row, "input", where=where)
        turns = _exchange(question, text_field(row, "output", where=where))
    else:
        turns, has_thinking = _reasoned_exchange(row, columns, where)
    _check_answer(turns, where)
    own = text_field(row, "system", where=where) if row.get("system") else system
    if own and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": own}, *turns]
    return Conversation(turns=turns, has_thinking=has_thinking, skipped=skipped)


def _exchange(question: str, answer: str) -> list[Turn]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _reasoned_exchange(row: Row, columns: Columns, where: str) -> tuple[list[Turn], bool]:
    question = text_field(row, columns.question, where=where)
    final = text_field(row, columns.response, where=where)
    thinking = row.get(columns.thinking) or ""
    if not isinstance(thinking, str):
        kind = type(thinking).__name__
        raise ValueError(f"{where}: {columns.thinking!r} is {kind}, expected text")
    thinking = thinking.strip()
    return _exchange(question, render_response(thinking, final)), bool(thinking)


def _turns_or_text(row: Row, key: str, role: str, where: str) -> list[Turn]:
    if isinstance(row[key], list):
        return _turns(row[key], f"{where}: {key}")
    return [{"role": role, "content": text_field(row, key, where=where)}]


def _turns(turns: Any, where: str) -> list[Turn]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: its turns are not a list of objects")
    return [_turn(turn, where=f"{where}, turn {number}") for number, turn in enumerate(turns)]


def _turn(turn: dict[str, Any], *, where: str) -> Turn:
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
        known = ", ".join(sorted(set(ROLES.values())))
        raise ValueError(f"{where}: needs a role of {known} and text content")
    for key, value in turn.items():
        if value and key not in _TURN_KEYS:
            raise ValueError(f"{where}: {key!r} is not supported: remove it or the row")
    thoughts = {key: text_field(turn, key, where=where) for key in THOUGHT_KEYS if turn.get(key)}
    return {"role": ROLES[role], "content": content} | thoughts


def _check_answer(turns: list[Turn], where: str) -> None:
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError(f"{where}: the last turn is not the assistant's")
    answer = turns[-1]["content"]
    if not answer.strip():
        raise ValueError(f"{where}: the assistant's turn is empty")
    if THINKING not in answer:
        return
    parsed = parse_response(answer)
    if parsed is None or "</think>" in parsed.thinking:
        raise ValueError(
            f"{where}: its answer could not be read back: the headings of the format, or </think>, "
            "stand inside its thinking or its final response"
        )
