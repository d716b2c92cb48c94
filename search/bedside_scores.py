"""Bedside scores as data: findings, their points, and where the points were published.

For demonstrating and testing the trainer, not for clinical use. An item of a score is a tuple of
levels with rising points; a level holds the findings that earn the same points, and a patient has
one finding per item. Measured values keep a distance from the published cut-offs.
"""

from collections.abc import Mapping
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


def _item(*levels: str, name: str = "", lowest: int = 0) -> Item:
    """An item of a score.

    `levels` holds the findings of each level, separated by commas and each preceded by `name`; a
    finding of the first level earns `lowest` points, and of each further level one point more.
    """
    return tuple(
        tuple(Finding(f"{name} {text}".strip(), points) for text in level.split(", "))
        for points, level in enumerate(levels, lowest)
    )


(IRRELEVANT,) = _item(
    "brown eyes, dark hair, born in May, blood type A, has a sister, lives nearby"
)
"""Findings that belong to no score and earn 0 points."""

APGAR = Score(
    kind="apgar",
    name="Apgar",
    source="Apgar, Current Researches in Anesthesia and Analgesia, 1953",
    items=(
        _item("skin blue", "limbs blue", "skin pink"),
        _item("none", "80", "130", name="pulse"),
        _item("none", "grimace", "cough", name="reflex"),
        _item("limp", "flexion", "active", name="tone"),
        _item("none", "slow", "strong", name="breathing"),
    ),
)

CHILD_PUGH = Score(
    kind="child_pugh",
    name="Child-Pugh",
    source="Pugh et al., British Journal of Surgery, 1973",
    items=(
        _item("1.2, 1.6", "2.4, 2.6", "4, 6", name="bilirubin", lowest=1),
        _item("3.8, 4.2", "3, 3.2", "2.2, 2.4", name="albumin", lowest=1),
        _item("2, 3", "5", "8, 9", name="prothrombin", lowest=1),
        _item("no ascites", "slight ascites", "moderate ascites", lowest=1),
        _item("0", "1, 2", "3, 4", name="encephalopathy", lowest=1),
    ),
)

BISHOP = Score(
    kind="bishop",
    name="Bishop",
    source="Bishop, Obstetrics and Gynecology, 1964",
    items=(
        _item("0", "1, 2", "3, 4", "5, 6", name="dilation"),
        _item("10, 20", "40, 50", "60, 70", "80, 90", name="effacement"),
        _item("-3", "-2", "-1, 0", "+1, +2", name="station"),
        _item("firm", "medium", "soft", name="cervix"),
        _item("posterior", "middle", "anterior", name="cervix"),
    ),
)

SCORES: Mapping[str, Score] = {score.kind: score for score in (APGAR, CHILD_PUGH, BISHOP)}
