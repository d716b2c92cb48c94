"""Reads the option that an output chooses.

Only the final response and the options are read, never the correct answer. Evidence is taken in
this order, and the first that is found decides:

1. statement: a field that holds the answer (JSON, boxed, a tag); else a letter that is stated to be
   the answer ("the answer is B", "B is correct", a tick); else an option's own words that are. Of
   several statements the last one counts; "B is correct ... D is correct" decides nothing. What
   follows a correction ("Wait, ...") is read by itself.
2. letter: the only letter that begins a line and is set off from the rest.
3. elimination: the only option that is not said to be wrong.
4. text: the only option's words that begin a line and are set off from the rest. Last of all, the
   only option, by letter or words, in whose favour the response or its conclusion speaks.
5. none: anything else, which counts as wrong. Similar spelling is never taken for an option.

A statement is ignored when it is denied, later taken back, asked, hypothetical or attributed to
others, and so is a list of the options. Two letters at once ("A and C"), or a letter that no option
has, state no answer. The phrases are in choice_wording.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from . import choice_wording as w
from .chat import FINAL, THINKING
from .choice_mentions import (
    Mention,
    find_labels,
    find_words,
    line_end,
    line_start,
    normalise,
    option_texts,
)


@dataclass(frozen=True)
class Extraction:
    """The option that an output chooses, and how it was found."""

    letter: str | None
    """Letter of the option; None without an answer."""
    rule: str
    """Evidence that decided: statement, letter, elimination, text or none."""
    conflicting: bool = False
    """Whether the claims name different options."""


def final_response(output: str) -> str:
    """Text after the last `## Final Response` or `</think>`; empty when the thinking never ends."""
    for marker in (FINAL, "</think>"):
        if marker in output:
            return output.rpartition(marker)[2].strip()
    return "" if THINKING in output or "<think>" in output else output.strip()


def extract_choice(output: str, options: dict[str, str]) -> str | None:
    """Letter of the option that the output chooses, or None when it chooses none.

    Args:
        output: The model's whole output.
        options: Letter -> text of each option.
    """
    return extract(output, options).letter


def extract(output: str, options: dict[str, str]) -> Extraction:
    """Finds the option that the output chooses, and the rule that decided.

    Args:
        output: The model's whole output.
        options: Letter -> text of each option.
    """
    text = normalise(final_response(output) or _conclusion(output))
    run_on = w.RUN_ON.search(text, 1)
    # what follows is read only if the response names no option before
    for part in (text[: run_on.start()], text) if run_on else (text,):
        if found := _read(part, options):
            return found
    return Extraction(None, "none")


def _conclusion(output: str) -> str:
    """Last paragraph of a finished `## Thinking` that lacks the heading of the final response."""
    *before, last = re.split(r"\n\s*\n", output.rpartition(THINKING)[2].strip())
    if THINKING not in output or not before:
        return ""
    headed = w.FINAL_HEADING.match(before[-1]) or w.FINAL_HEADING.match(last)
    return last if headed or _is_complete(normalise(last)) else ""


def _read(text: str, options: dict[str, str]) -> Extraction | None:
    """Reads a response; None when it names no option."""
    texts = option_texts(tuple(options.items()))
    labels = find_labels(text, texts, options)
    words = find_words(text, texts, labels)
    if not labels and not words:
        return None
    values = [match[match.lastindex or 0] for match in w.FIELD.finditer(text)]
    fields = [_read(value.strip("\"' "), options) for value in values]
    if readings := [field.letter for field in fields if field]:
        return Extraction(readings[-1], "statement", len({*readings}) > 1)

    excluded = {x: m.start for m in [*labels, *words] if m.excluded for x in m.letters}
    labels = [m for m in labels if excluded.get(m.letter or "", -1) < m.start]
    words = [m for m in words if excluded.get(m.letter or "", -1) < m.start]
    named = [label for label in labels if label.letter is None or label.letter in options]
    for mentions, claims in (
        (labels, [label for label in labels if label.claimed]),
        (labels, [label for label in named if label.concluded and label.ends_sentence]),
        (words, [word for word in words if word.claimed and word.meant]),
        (words, [word for word in words if word.concluded and word.meant]),
    ):
        if claims:
            corrected = _corrected(text, claims[0], mentions)
            letter = _last_claim(text, corrected or claims)
            conflicting = len({m.letter for m in [*claims, *corrected]}) > 1
            return Extraction(letter if letter in options else None, "statement", conflicting)
    if alone := _alone(text, named):
        return Extraction(alone.letter, "letter")
    remaining = [option for option in options if option not in excluded]
    # a list with one option a line may have been cut before the last one
    if len(remaining) == 1 and not (remaining[0] == [*options][-1] and "\n" in text):
        return Extraction(remaining[0], "elimination")
    if alone := _alone(text, words):
        return Extraction(alone.letter, "text")
    if found := _only_supported(text, sorted([*named, *words], key=lambda m: m.start)):
        return Extraction(found.letter, "letter" if found in named else "text")
    return Extraction(None, "none")


def _corrected(text: str, claim: Mention, mentions: list[Mention]) -> list[Mention]:
    """The options that a correction of an earlier claim arrives at."""
    starts = [found.end() for found in w.CORRECTION.finditer(text, claim.end)]
    return [
        m
        for m in mentions
        if starts
        and m.start >= starts[-1]
        and not m.unsure
        and (m.stated or not text[starts[-1] : m.start].strip(" ,:.—-"))
    ]


def _last_claim(text: str, claims: list[Mention]) -> str | None:
    """Letter of the last claim, unless it merely stands beside one of another option."""
    chosen = claims[0]
    undecided = False
    for before, claim in pairwise(claims):
        if claim.explicit or w.TURNS_TO.search(text, before.end, claim.start):
            chosen, undecided = claim, False
        elif not chosen.explicit:
            undecided |= claim.letter != chosen.letter
    return None if undecided else chosen.letter


def _alone(text: str, mentions: list[Mention]) -> Mention | None:
    """The only option that begins a line and is set off from what follows."""
    heads = [m for m in mentions if not m.listed and _begins_line(text, m)]
    for m in heads:
        bare = not text[m.end : line_end(text, m.end)].strip(" .,、。:)!\"'")
        set_off = bare or m.own_words or w.SETS_OFF.match(text, m.end)
        if set_off and m.mark != "?" and not m.denied and len({m.letter for m in heads}) == 1:
            return m
    return None


def _only_supported(text: str, mentions: list[Mention]) -> Mention | None:
    """The only option that the response, or else its last sentence, supports."""
    supported = [
        m
        for m in mentions
        if m.letter and not (m.denied or m.common or m.unsure or w.EXAMPLE_LEFT.search(m.left))
    ]
    stops = [stop.end() for stop in w.SENTENCE_END.finditer(text, 0, len(text) - 1)]
    last_start = stops[-1] if stops else 0
    if len({m.letter for m in supported}) > 1:
        concludes = w.CONCLUDES.search(text[last_start:].lower())
        supported = [m for m in supported if concludes and m.start >= last_start and m.endorsed]
    if len({m.letter for m in supported}) != 1:
        return None
    singled_out = any(m.singled_out for m in supported)
    return supported[-1] if singled_out and _is_complete(text) else None


def _begins_line(text: str, label: Mention) -> bool:
    before = text[line_start(text, label.start) : label.start].lower()
    return bool(w.LEADS_IN.fullmatch(before.strip(" •.0123456789")))


def _is_complete(text: str) -> bool:
    """Whether the output was not cut within its last sentence."""
    return text.endswith((".", "!", "。", ")", '"'))
