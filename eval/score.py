"""Letters that outputs choose, and the accuracy over all items."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence

from ..core.text.chat import FINAL
from ..core.text.choice_mentions import find_texts, normalise, option_texts
from ..core.text.choices import Extraction, extract, extract_choice, final_response

__all__ = [
    "Extraction",
    "accuracy",
    "accuracy_original",
    "extract",
    "extract_choice",
    "extract_original",
    "final_response",
]


def extract_original(output: str, options: dict[str, str]) -> tuple[str | None, str | None] | None:
    """First and last option that the output names, which are the original's two readings.

    The original reads the answer after the last `## Final Response` and a blank line by two rules,
    and keeps the rule that is correct more often. The rules themselves are not published; here they
    are the first and the last option named, by its letter ("B.", "(B)") or by its text. An output
    without the heading is read whole.

    Args:
        output: The model's whole output.
        options: Letter -> text of each option.

    Returns:
        The two letters, each None when no option is named; None for an empty answer, which the
        original leaves out.
    """
    answer = output.rpartition(f"{FINAL}\n\n")[2].strip()
    if not answer:
        return None
    text = normalise(answer)
    labels = re.finditer(r"(?<![A-Za-z0-9])[A-Z](?=[.,:)\s]|$)", text)
    named = [(label.start(), label[0]) for label in labels if label[0] in options]
    words = find_texts(text.lower(), option_texts(tuple(options.items())))
    named += [(start, letter) for start, _, letter in words if letter]
    return (min(named)[1], max(named)[1]) if named else (None, None)


def accuracy(letters: Sequence[str | None], answers: Sequence[str]) -> float:
    """Share of the items whose letter is the correct one; None, without an answer, is wrong.

    Args:
        letters: [items], the letter chosen.
        answers: [items], the correct letter.

    Raises:
        ValueError: there are no items, or the lengths differ.
    """
    if len(letters) != len(answers) or not answers:
        raise ValueError(
            "accuracy needs as many letters as answers, at least one; "
            f"got {len(letters)} and {len(answers)}"
        )
    return sum(map(operator.eq, letters, answers)) / len(answers)


def accuracy_original(
    readings: Sequence[tuple[str | None, str | None] | None], answers: Sequence[str]
) -> tuple[float, int]:
    """Accuracy as the original computes it: without empty answers, by the better of two rules.

    Both choices bias it upwards, so it serves only for comparison with published numbers.

    Args:
        readings: [items], the result of `extract_original`.
        answers: [items], the correct letter.

    Returns:
        The accuracy, NaN when every answer is empty, and the number of items that count.
    """
    kept = [(pair, answer) for pair, answer in zip(readings, answers, strict=True) if pair]
    right = max(sum(pair[rule] == answer for pair, answer in kept) for rule in (0, 1))
    return (right / len(kept) if kept else float("nan")), len(kept)
