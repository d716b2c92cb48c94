"""The text a verifier reads, cut to its length, how its answer is read, and how answers are compared. Pure but for loading a
template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TEMPLATE = (
    "A model answered a medical question. Decide whether its answer agrees with the reference.\n\n"
    "Answer of the model:\n{response}\n\n"
    "Reference answer:\n{reference}\n\n"
    "The answer of the model is"
)
"""Ours; the classifier's two classes complete it. A verifier trained on another text brings its own template."""

VERDICTS = {"true": True, "false": False, "正确": True, "错误": False, "真": True, "假": False}
"""The whole words that an LLM may judge by."""
FENCE = re.compile(r"\s*```(?:json|text|plaintext|markdown)?\s")


class Tiers(NamedTuple):
    """The scores that an answer can earn."""

    right: float = 1.0
    wrong: float = 0.1
    unparsable: float = 0.0

    def score(self, right: bool, *, parsable: bool = True) -> float:
        """The score of a right or wrong answer, or of one in a broken format."""
        if not parsable:
            return self.unparsable
        return self.right if right else self.wrong


def check_template(template: str) -> None:
    """Raises ValueError unless the template holds {response} and {reference} once each, in this order."""
    response, reference = template.find("{response}"), template.find("{reference}")
    if (
        template.count("{response}") != 1
        or template.count("{reference}") != 1
        or response > reference
    ):
        raise ValueError("verifier template: needs {response} once and, after it, {reference} once")


def load_template(path: str | None) -> str:
    """The template of a text file, or ours. Raises ValueError when it cannot be read or used."""
    if path is None:
        return TEMPLATE
    try:
        template = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"verifier template {path}: {error.strerror}") from None
    check_template(template)
    return template


def verifier_ids(
    encode: Callable[[str], list[int]],
    response: str,
    reference: str,
    *,
    template: str,
    max_tokens: int,
) -> tuple[list[int], int]:
    """Token ids of the filled-in template, and how many of the response's tokens were cut to fit `max_tokens`.

    The cut is in the middle of the response, never in the reference or the instruction.
    Raises ValueError when these alone leave no room for the response.
    """
    before, after = template.split("{response}")
    head, tail = encode(before), encode(after.replace("{reference}", reference))
    body = encode(response)
    room = max_tokens - len(head) - len(tail)
    if len(body) <= room:
        return head + body + tail, 0
    if room < 2:
        raise ValueError(
            f"verifier input: instruction and reference take {len(head) + len(tail)} of max_tokens={max_tokens}, which leaves "
            f"no room for the response; raise it (reference: {reference[:60]!r})"
        )
    kept_front = (room + 1) // 2
    return head + body[:kept_front] + body[len(body) - (room - kept_front) :] + tail, len(
        body
    ) - room


def normalise_answer(text: str) -> str:
    """An answer for comparison: case folded, white space collapsed, outer punctuation removed."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'()[]*")


def after_thought(text: str) -> str:
    """An answer without the thought that reasoning models write before it, up to </think>; <think> may stand in the prompt."""
    return text.rpartition("</think>")[2]


def parse_verdict(text: str) -> bool | None:
    """An LLM's verdict: its whole answer is one of the words in VERDICTS, or {"verdict": one of them or a boolean}. White
    space, quotes, asterisks, a code fence and a full stop around it do not matter, nor does case. None for anything else:
    "untrue", "True and false", a sentence that holds the word."""
    text = FENCE.sub("", after_thought(text), count=1).strip(" \t\r\n`*_\"'“”‘’「」.。!！,，;；")
    if not text.startswith("{"):
        return VERDICTS.get(text.casefold())
    try:
        verdict = json.loads(text)["verdict"]
    except (
        ValueError,
        KeyError,
        RecursionError,
    ):  # the last for what repeats a bracket until it is cut off
        return None
    return verdict if isinstance(verdict, bool) else VERDICTS.get(str(verdict).strip().casefold())
