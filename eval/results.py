"""Scores the answers: a row for each item, and a summary for each source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from ..core.messages import mask_credentials
from ..core.report.statistics import wilson_interval
from ..core.text.chat import parse_response
from .asked_questions import Answer, AskedQuestion
from .config import EvalConfig, Scoring
from .questions import Question
from .score import accuracy_original, extract, extract_original
from .significance import (
    Estimate,
    LengthStatistics,
    PositionBias,
    accuracy_interval,
    agreement_rate,
    length_statistics,
    majority_vote,
    pass_at_k,
    position_bias,
)

Row = TypeVar("Row")
REPORTED_SETTINGS = [
    "model",
    "engine",
    "base_url",
    "endpoint",
    "prompt",
    "system_prompt",
    "runs",
    "permutations",
    "temperature",
    "max_new_tokens",
    "scoring",
    "limit",
    "seed",
    "data",
]
"""Fields of the configuration that the results repeat."""
OUTCOMES = ("right", "wrong", "no answer", "failed")
"""Outcomes of an answer. All but the first count as wrong."""


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """One scored answer. All letters but `shown` are those of the file's order of options."""

    run: int
    permutation: int
    """Number of the order of the options; 0 is the order of the file."""
    letter: str | None
    """Letter by the leading scoring, which the configuration chooses."""
    rule: str
    """Rule of the strict cascade that decided."""
    conflicting: bool
    """Whether the answer claims different options."""
    shown: str | None
    """Letter by the strict cascade, in the order of options that the model saw."""
    original: Sequence[str | None] | None
    """First and last option named; None for an empty answer."""
    num_tokens: int
    finish_reason: str
    truncated: bool
    """Whether the answer reached the token limit."""
    in_format: bool
    """Whether the answer has the headings of the thinking format."""
    error: str | None
    """Why the call failed; None for an answer."""
    letters: dict[Scoring, str | None]
    """Letter by each scoring."""
    right: bool
    outcome: str
    """One of `OUTCOMES`."""


@dataclass(frozen=True, kw_only=True)
class ItemRow(Question):
    """One item with all its answers."""

    answers: list[AnswerRow]
    """Answers in order of permutation, then run."""

    def letters(self, scoring: Scoring, *, permutation: int = 0) -> list[str | None]:
        """Letter of each run, asked in one order of the options."""
        return [
            answer.letters[scoring] for answer in self.answers if answer.permutation == permutation
        ]

    def right(self, scoring: Scoring, *, permutation: int = 0) -> list[bool]:
        """Whether each run chose the correct option, asked in one order of the options."""
        return [letter == self.gold for letter in self.letters(scoring, permutation=permutation)]

    def majority_right(self, scoring: Scoring) -> bool:
        """Whether the letter that most runs chose is correct."""
        return majority_vote(self.letters(scoring)) == self.gold


@dataclass(frozen=True)
class Accuracy(Estimate):
    """Accuracy by one scoring."""

    num: float
    """Number of items that count; a fraction if only some runs of an item count."""


@dataclass(frozen=True)
class Position(PositionBias):
    """How the choices depend on the order of the options."""

    orders: int
    """Number of orders of the options."""
    accuracies: list[Estimate]
    """Accuracy by order, the file's first."""
    agreement: float | None
    """Share of pairs of orders in which the same option was chosen; None with one order."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Results over a set of items. All but `position` use only the file's order of options."""

    num: int
    runs: int
    accuracy: Accuracy
    """Accuracy by the leading scoring."""
    scorings: dict[Scoring, Accuracy]
    pass_at_k: dict[str, float]
    """Probability that one of k runs is right, for each k."""
    majority: Estimate
    """Accuracy of the majority votes."""
    outcomes: dict[str, int]
    rules: dict[str, int]
    """Number of answers decided by each rule of the strict cascade."""
    conflicting: int
    format_rate: float
    length: LengthStatistics | None
    """Lengths of the answers; None when every call failed."""
    position: Position


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An answer that failed for good, and counts as wrong."""

    source: str
    id: str
    file: str
    index: int
    run: int
    permutation: int
    error: str


@dataclass(frozen=True, kw_only=True)
class EvaluationResults:
    """Contents of results.json."""

    config: dict[str, Any]
    sources: dict[str, Summary]
    all: Summary
    malformed: list[str]
    """One line for each malformed item, which was left out."""
    failures: list[Failure]
    items: list[ItemRow]
    seconds: float
    """Duration of the run."""


def item_rows(
    questions: Sequence[Question],
    asked: Sequence[AskedQuestion],
    answers: Sequence[Answer],
    scoring: Scoring,
) -> list[ItemRow]:
    """Scores the answers of every question.

    Args:
        questions: The questions in the file's order of options.
        asked: The questions as asked; all those of one question are adjacent.
        answers: The answer to each of `asked`.
        scoring: The leading scoring, which decides `letter`, `right` and `outcome`.
    """
    cases = [
        (item, answer, extract_original(answer.text, item.question.options))
        for item, answer in zip(asked, answers, strict=True)
    ]
    num_right: Counter[tuple[str, int]] = Counter()
    for item, _, readings in cases:
        for rule, letter in enumerate(readings or ()):
            num_right[item.question.source, rule] += letter == item.question.gold
    scored = []
    for item, answer, readings in cases:
        # the original keeps the reading that is right more often in the source
        source = item.question.source
        rule = int(num_right[source, 1] > num_right[source, 0])
        scored.append(_score_answer(item, answer, readings, rule, scoring))
    rows = iter(scored)
    each = len(asked) // len(questions)
    return [ItemRow(**vars(question), answers=list(islice(rows, each))) for question in questions]


def _score_answer(
    asked: AskedQuestion,
    answer: Answer,
    readings: tuple[str | None, str | None] | None,
    rule: int,
    scoring: Scoring,
) -> AnswerRow:
    """Scores one answer; `rule` is the reading of `readings` that the original keeps."""
    extraction = extract(answer.text, asked.question.options)
    original = readings and [asked.file_letter(letter) for letter in readings]
    letters: dict[Scoring, str | None] = {
        "strict_cascade": asked.file_letter(extraction.letter),
        "original": original[rule] if original else None,
    }
    letter = letters[scoring]
    right = letter == asked.file_letter(asked.question.gold)
    if answer.error:
        outcome = "failed"
    elif letter is None:
        outcome = "no answer"
    else:
        outcome = "right" if right else "wrong"
    return AnswerRow(
        run=asked.run,
        permutation=asked.permutation,
        letter=letter,
        rule=extraction.rule,
        conflicting=extraction.conflicting,
        shown=extraction.letter,
        original=original,
        num_tokens=answer.num_tokens,
        finish_reason=answer.finish_reason,
        truncated=answer.finish_reason == "length",
        in_format=parse_response(answer.text) is not None,
        error=answer.error,
        letters=letters,
        right=right,
        outcome=outcome,
    )


def group_by(
    rows: Iterable[Row],
    key: Callable[[Row], str],
) -> dict[str, list[Row]]:
    """Groups the rows by their keys, in the order in which the keys first occur.

    Args:
        rows: Rows to group; each group keeps their order.
        key: Function that gives the key of a row.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def summarise_evaluation(
    config: EvalConfig,
    items: list[ItemRow],
    malformed: list[str],
    *,
    seconds: float,
) -> EvaluationResults:
    """Summarises the items for each source and over all of them.

    Args:
        config: The evaluation's configuration.
        items: The scored items.
        malformed: One line for each malformed item.
        seconds: Duration of the run.
    """
    settings = {name: getattr(config, name) for name in REPORTED_SETTINGS}
    settings |= {"model": config.client.model, "top_p": config.nucleus}
    settings = mask_credentials(settings)
    failures = [
        Failure(
            source=item.source,
            id=item.id,
            file=item.file,
            index=item.index,
            run=answer.run,
            permutation=answer.permutation,
            error=answer.error,
        )
        for item in items
        for answer in item.answers
        if answer.error
    ]
    groups = group_by(items, lambda item: item.source)
    return EvaluationResults(
        config=settings,
        sources={source: summarise(group, config.scoring) for source, group in groups.items()},
        all=summarise(items, config.scoring),
        malformed=malformed,
        failures=failures,
        items=items,
        seconds=seconds,
    )


def summarise(items: Sequence[ItemRow], scoring: Scoring) -> Summary:
    """Summarises the answers to a set of items.

    Args:
        items: The scored items, all with the same number of runs.
        scoring: The leading scoring.
    """
    right = [item.right(scoring) for item in items]
    runs = len(right[0])
    answers = [answer for item in items for answer in item.answers[:runs]]
    strict = accuracy_interval([item.right("strict_cascade") for item in items])
    scorings: dict[Scoring, Accuracy] = {
        "strict_cascade": Accuracy(**vars(strict), num=len(items)),
        "original": _original_accuracy(items, runs),
    }
    received = [answer for answer in answers if not answer.error]
    return Summary(
        num=len(items),
        runs=runs,
        accuracy=scorings[scoring],
        scorings=scorings,
        pass_at_k={str(k): pass_at_k(right, k) for k in range(1, runs + 1)},
        majority=accuracy_interval([[item.majority_right(scoring)] for item in items]),
        outcomes={name: sum(answer.outcome == name for answer in answers) for name in OUTCOMES},
        rules=dict(Counter(answer.rule for answer in answers).most_common()),
        conflicting=sum(answer.conflicting for answer in answers),
        format_rate=sum(answer.in_format for answer in answers) / len(answers),
        length=length_statistics(
            [answer.num_tokens for answer in received], [answer.truncated for answer in received]
        )
        if received
        else None,
        position=_position(items, scoring),
    )


def _original_accuracy(items: Sequence[ItemRow], runs: int) -> Accuracy:
    """Accuracy as the original computes it, with the better rule of each source."""
    right = 0.0
    kept = 0
    for group in group_by(items, lambda item: item.source).values():
        answers = [(a.original, item.gold) for item in group for a in item.answers[:runs]]
        share, num = accuracy_original(*zip(*answers, strict=True))
        if num:
            right += share * num
            kept += num
    if not kept:
        return Accuracy(None, None, None, 0.0)
    return Accuracy(right / kept, *wilson_interval(right / runs, kept / runs), num=kept / runs)


def _position(items: Sequence[ItemRow], scoring: Scoring) -> Position:
    shown = [(answer.shown, list(item.options)) for item in items for answer in item.answers]
    first_runs = [
        [answer.letters[scoring] for answer in item.answers if answer.run == 0] for item in items
    ]
    orders = len(first_runs[0])
    accuracies = [
        accuracy_interval([item.right(scoring, permutation=order) for item in items])
        for order in range(orders)
    ]
    agreement = agreement_rate(first_runs) if orders > 1 else None
    bias = position_bias(*zip(*shown, strict=True))
    return Position(**vars(bias), orders=orders, accuracies=accuracies, agreement=agreement)
