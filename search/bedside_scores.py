"""Bedside scores as data: findings, their points, and where the points were published.

For demonstrating and testing the trainer, not for clinical use. An item of a score is a tuple of
levels with rising points; a level holds the findings that earn the same points, and a patient has
one finding per item. Measured values keep a distance from the published cut-offs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Finding(NamedTuple):
    """A finding in a few words, and the points that it earns."""

    text: str
    points: int


Item = tuple[tuple[Finding, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A bedside score."""

    kind: str
    name: str
    source: str
    items: tuple[Item, ...]


def _measured(name: str, values: Mapping[int, Sequence[float | str]]) -> Item:
    """A measurement: values by the points that they earn, in rising order."""
    return tuple(
        tuple(Finding(f"{name} {value}", points) for value in level)
        for points, level in values.items()
    )


def _graded(*grades: tuple[str, int]) -> Item:
    """Named grades, one for each level, in rising order of points."""
    return tuple((Finding(*grade),) for grade in grades)


IRRELEVANT = tuple(
    Finding(text, 0)
    for text in (
        "brown eyes",
        "dark hair",
        "born in May",
        "blood type A",
        "has a sister",
        "lives nearby",
    )
)
"""Findings that belong to no score and earn 0 points."""

APGAR = Score(
    kind="apgar",
    name="Apgar",
    source="Apgar, Current Researches in Anesthesia and Analgesia, 1953",
    items=(
        _graded(
            ("skin blue", 0),
            ("limbs blue", 1),
            ("skin pink", 2),
        ),
        _graded(
            ("pulse none", 0),
            ("pulse 80", 1),
            ("pulse 130", 2),
        ),
        _graded(
            ("reflex none", 0),
            ("reflex grimace", 1),
            ("reflex cough", 2),
        ),
        _graded(
            ("tone limp", 0),
            ("tone flexion", 1),
            ("tone active", 2),
        ),
        _graded(
            ("breathing none", 0),
            ("breathing slow", 1),
            ("breathing strong", 2),
        ),
    ),
)

CHILD_PUGH = Score(
    kind="child_pugh",
    name="Child-Pugh",
    source="Pugh et al., British Journal of Surgery, 1973",
    items=(
        _measured("bilirubin", {1: (1.2, 1.6), 2: (2.4, 2.6), 3: (4, 6)}),
        _measured("albumin", {1: (3.8, 4.2), 2: (3, 3.2), 3: (2.2, 2.4)}),
        _measured(
            "prothrombin",
            {1: (2, 3), 2: (5,), 3: (8, 9)},
        ),
        _graded(
            ("no ascites", 1),
            ("slight ascites", 2),
            ("moderate ascites", 3),
        ),
        _measured("encephalopathy", {1: (0,), 2: (1, 2), 3: (3, 4)}),
    ),
)

BISHOP = Score(
    kind="bishop",
    name="Bishop",
    source="Bishop, Obstetrics and Gynecology, 1964",
    items=(
        _measured("dilation", {0: (0,), 1: (1, 2), 2: (3, 4), 3: (5, 6)}),
        _measured(
            "effacement",
            {0: (10, 20), 1: (40, 50), 2: (60, 70), 3: (80, 90)},
        ),
        _measured(
            "station",
            {0: ("-3",), 1: ("-2",), 2: ("-1", "0"), 3: ("+1", "+2")},
        ),
        _graded(
            ("cervix firm", 0),
            ("cervix medium", 1),
            ("cervix soft", 2),
        ),
        _graded(
            ("cervix posterior", 0),
            ("cervix middle", 1),
            ("cervix anterior", 2),
        ),
    ),
)

SCORES: Mapping[str, Score] = {score.kind: score for score in (APGAR, CHILD_PUGH, BISHOP)}
