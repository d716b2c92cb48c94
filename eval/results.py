"""From answers to numbers: a row for each item, and what each source's rows come to. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from ..core.report.statistics import wilson_interval
from ..core.text.chat import parse_response
from .answering import Answer, Case
from .config import Scoring
from .questions import Question
from .score import accuracy_original, extract, extract_original
from .significance import (
    accuracy_interval,
    agreement_rate,
    length_statistics,
    majority_vote,
    pass_at_k,
    position_bias,
)

Row = dict[str, Any]
OUTCOMES = ("right", "wrong", "no answer", "failed")
"""An answer is one of these; all but the first count as wrong, none leaves the denominator."""


def score_answer(case: Case, answer: Answer) -> Row:
    """What is kept of an answer, scored by the strict cascade. Letters are those of the file, in whatever order the options
    were shown; `shown` is the letter as given, `original` the original's two readings of it or None."""
    extraction = extract(answer.text, case.question.options)
    readings = extract_original(answer.text, case.question.options)
    letter = case.back[extraction.letter] if extraction.letter else None
    return {
        "run": case.run,
        "permutation": case.permutation,
        "letter": letter,
        "rule": extraction.rule,
        "conflicting": extraction.conflicting,
        "shown": extraction.letter,
        "original": readings and [case.back[reading] if reading else None for reading in readings],
        "num_tokens": answer.num_tokens,
        "finish_reason": answer.finish_reason,
        "truncated": answer.finish_reason == "length",
        "in_format": parse_response(answer.text) is not None,
        "error": answer.error,
    }


def item_rows(
    questions: Sequence[Question],
    cases: Sequence[Case],
    answers: Sequence[Answer],
    scoring: Scoring,
) -> list[Row]:
    """One row for each question, with all its answers in the order of the cases; `letter` and `right` are by `scoring`."""
    each = len(cases) // len(questions)
    rows = []
    for n, question in enumerate(questions):
        mine = slice(n * each, (n + 1) * each)
        rows.append(
            {
                "id": question.id,
                "source": question.source,
                "file": question.file,
                "index": question.index,
                "question": question.question,
                "options": question.options,
                "gold": question.answer_idx,
                "answers": [
                    score_answer(case, answer)
                    for case, answer in zip(cases[mine], answers[mine], strict=True)
                ],
            }
        )
    for items in by_source(rows).values():
        _lead(items, scoring)
    return rows


def _lead(items: Sequence[Row], scoring: Scoring) -> None:
    """Adds to each answer of a source its `letters` by both scorings, and sets letter, right and outcome by the leading one.
    The original takes that one of its two readings which is right more often."""
    pairs = [(answer, item["gold"]) for item in items for answer in item["answers"]]
    reading = max(
        (0, 1),
        key=lambda n: sum(
            answer["original"][n] == gold for answer, gold in pairs if answer["original"]
        ),
    )
    for answer, gold in pairs:
        original = answer["original"][reading] if answer["original"] else None
        answer["letters"] = {"strict_cascade": answer["letter"], "original": original}
        letter = answer["letter"] = answer["letters"][scoring]
        answer["right"] = letter == gold
        given = "no answer" if letter is None else "right" if letter == gold else "wrong"
        answer["outcome"] = "failed" if answer["error"] else given


def right_runs(item: Row, scoring: Scoring) -> list[bool]:
    """Whether each run got the item right in the file's order of options."""
    return [
        answer["letters"][scoring] == item["gold"]
        for answer in item["answers"]
        if not answer["permutation"]
    ]


def right_by_majority(item: Row, scoring: Scoring) -> bool:
    """Whether the letter that most runs gave is right."""
    return (
        majority_vote([a["letters"][scoring] for a in item["answers"] if not a["permutation"]])
        == item["gold"]
    )


def by_source(items: Sequence[Row]) -> dict[str, list[Row]]:
    """The items of each source, in the order of the sources' first items."""
    groups: dict[str, list[Row]] = {}
    for item in items:
        groups.setdefault(item["source"], []).append(item)
    return groups


def summarise(items: Sequence[Row], scoring: Scoring) -> Row:
    """The numbers of these items. All but `position` speak of the file's order of options alone."""
    answers = [answer for item in items for answer in item["answers"] if not answer["permutation"]]
    runs = [right_runs(item, scoring) for item in items]
    strict = accuracy_interval([right_runs(item, "strict_cascade") for item in items])._asdict()
    scorings = {
        "strict_cascade": strict | {"num": len(items)},
        "original": _original_accuracy(items),
    }
    came = [answer for answer in answers if not answer["error"]]
    return {
        "num": len(items),
        "runs": len(runs[0]),
        "accuracy": scorings[scoring],
        "scorings": scorings,
        "pass_at_k": {str(k): pass_at_k(runs, k) for k in range(1, len(runs[0]) + 1)},
        "majority": accuracy_interval(
            [[right_by_majority(item, scoring)] for item in items]
        )._asdict(),
        "outcomes": {
            outcome: sum(answer["outcome"] == outcome for answer in answers) for outcome in OUTCOMES
        },
        "rules": dict(Counter(answer["rule"] or "none" for answer in answers).most_common()),
        "conflicting": sum(answer["conflicting"] for answer in answers),
        "format_rate": sum(answer["in_format"] for answer in answers) / len(answers),
        "length": length_statistics(
            [a["num_tokens"] for a in came], [a["truncated"] for a in came]
        )._asdict()
        if came
        else None,
        "position": _position(items, scoring),
    }


def _original_accuracy(items: Sequence[Row]) -> Row:
    """As the original counts: empty answers dropped, for each source the better of two rules. `num`: the items' worth of
    answers that is left, which is also the interval's."""
    right, kept = 0.0, 0
    runs = sum(not answer["permutation"] for answer in items[0]["answers"])
    for group in by_source(items).values():
        pairs = [
            (a["original"], item["gold"])
            for item in group
            for a in item["answers"]
            if not a["permutation"]
        ]
        share, num = accuracy_original(*zip(*pairs, strict=True))
        right, kept = right + (share * num if num else 0), kept + num
    low, high = wilson_interval(right / runs, kept / runs) if kept else (None, None)
    return {"value": right / kept if kept else None, "low": low, "high": high, "num": kept / runs}


def _position(items: Sequence[Row], scoring: Scoring) -> Row:
    """Which letters were chosen as shown, over all orders, and with several orders how often the same option was."""
    answers = [
        (answer["shown"], list(item["options"])) for item in items for answer in item["answers"]
    ]
    bias = position_bias(*zip(*answers, strict=True))
    position: Row = {key: _finite(value) for key, value in bias._asdict().items()}
    orders = 1 + max(answer["permutation"] for answer in items[0]["answers"])
    position["orders"] = orders
    if orders > 1:
        accuracies: list[list[list[bool]]] = [[] for _ in range(orders)]
        agreements = []
        for item in items:
            for order, group in groupby(item["answers"], key=lambda answer: answer["permutation"]):
                accuracies[order].append(
                    [answer["letters"][scoring] == item["gold"] for answer in group]
                )
            first_runs = [
                answer["letters"][scoring] for answer in item["answers"] if answer["run"] == 0
            ]
            agreements.append(first_runs)
        position["accuracies"] = [accuracy_interval(order)._asdict() for order in accuracies]
        position["agreement"] = agreement_rate(agreements)
    return position


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
