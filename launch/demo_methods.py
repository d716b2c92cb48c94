"""Answers of the long demo: the method is chosen in the first words, the score comes much later.

Between the two lies the working and a long list of checks, which is the same in every answer. So
the choice of the method, and every slip in the working, is at least 170 tokens old when the
verifier scores the answer. Only one method adds the points up. And no method helps with one of the
scores, which stage 1 was not taught: the critic can know that from the question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

Record = dict[str, Any]
Steps = Sequence[tuple[str, int]]
"""The findings of a problem with their points."""

Method = Callable[[Steps], tuple[str, int]]
"""Findings -> the working, and the answer that it leads to."""

KNOWN = ("apgar", "bishop")
"""Scores that stage 1 is taught."""
NUM_CHECKS = 60
"""Checks in an answer, of three tokens each."""
CHECKS = " ".join(f"check {number} ;" for number in range(1, NUM_CHECKS + 1))


def with_methods(records: Sequence[Record], seed: int) -> list[Record]:
    """The records of known scores, each with the reasoning and answer of a random method."""
    rng = random.Random(f"methods/{seed}")
    names = list(METHODS)
    return [worked(record, rng.choice(names)) for record in records if record["kind"] in KNOWN]


def worked(record: Record, method: str) -> Record:
    """A record with the reasoning and the answer of a method: its name, its working, the checks.

    Args:
        record: a record of `search.calculations.generate`.
        method: a key of `METHODS`.
    """
    working, answer = METHODS[method](_steps(record))
    reasoning = f"{method} : {working} , so {answer} . {CHECKS}"
    return record | {"Complex_CoT": reasoning, "Response": str(answer)}


def _steps(record: Record) -> Steps:
    steps = [step.split(" , ")[0] for step in record["Complex_CoT"].split(" ; ")]
    pairs = [step.rsplit(" = ", 1) for step in steps]
    return [(text, int(points)) for text, points in pairs]


def _sum(steps: Steps) -> tuple[str, int]:
    totals = list(accumulate(points for _, points in steps))
    lines = [
        f"{text} = {points} , total {total}"
        for (text, points), total in zip(steps, totals, strict=True)
    ]
    return " ; ".join(lines), totals[-1]


def _highest(steps: Steps) -> tuple[str, int]:
    lines = [f"{text} = {points}" for text, points in steps]
    return " ; ".join(lines), max(points for _, points in steps)


def _count(steps: Steps) -> tuple[str, int]:
    return " ; ".join(text for text, _ in steps), len(steps)


METHODS: dict[str, Method] = {
    "sum": _sum,
    "highest": _highest,
    "count": _count,
}
"""Sum of the points, which is right; their maximum; the number of findings."""
METHOD_WORDS = f"## Thinking\n\n {' : '.join(METHODS)} : , so . {CHECKS}"
"""Words that the answers have beside those of the problems."""
