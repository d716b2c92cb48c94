"""Labelled answers that the verifier learns from: (response, reference, label)."""

from __future__ import annotations

import random
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..core.llm.judge import JudgedAnswer
from ..core.text.chat import parse_response
from ..core.text.data import ANSWER_KEY, QUESTION_KEY, Purpose, Row, load_rows, text_field
from ..core.text.verifier_text import verifier_input
from .conversations import AnswerColumns

PHRASES = (
    "{}",
    "{}.",
    "The answer is {}.",
    "The most likely answer is {}.",
    "It is {}.",
    "This points to {}.",
)
"""Sentences that exam options are put into."""


@dataclass(frozen=True, kw_only=True)
class LabelledAnswer:
    """A final response, the reference answer, and whether the response is right."""

    response: str
    reference: str
    label: bool
    row: int = 0
    """Number of the row it was made from; answers of one row are held out together."""


@dataclass(frozen=True, kw_only=True)
class LabelledIds:
    """A labelled answer as token ids of the verifier's input."""

    token_ids: list[int] = field(repr=False)
    label: int
    row: int


JudgeFunction = Callable[[list[JudgedAnswer]], list[bool | None]]
"""Answers to judge -> whether each is right; None without a verdict."""


def load_answers(
    sources: str,
    *,
    limit: int | None,
    seed: int,
    wrong_per_question: int,
    columns: AnswerColumns = AnswerColumns(),  # noqa: B008 immutable
    judge: JudgeFunction | None = None,
    purpose: Purpose = "train",
) -> tuple[list[LabelledAnswer], dict[str, int]]:
    """Reads the labelled answers of the sources' rows.

    The kind of a row follows from its keys:

        response, reference, label         a labelled answer; or `completion`, text or turns
        question, options, answer_idx      an exam question: right and wrong options
        Ground-True Answer, trajectory     a search record: each step's conclusion and verdict
        response, answer, judge            a rollout judged by a model; `judge` is true/false
        response, reference or answer      without a label; needs `judge`

    Args:
        sources: comma-separated files, folders or hub ids.
        limit: rows to read of each source; None for all.
        seed: seed of the phrases and wrong options that are drawn.
        wrong_per_question: wrong options used of each exam question.
        columns: keys of response, reference and label.
        judge: labels the rows that have no label.
        purpose: as for `load_rows`.

    Returns:
        The answers, and the number of rows of each kind.

    Raises:
        ValueError: a row is of none of these kinds; the message names it.
    """
    unlabelled: dict[int, JudgedAnswer] = {}
    answers: list[LabelledAnswer] = []
    kinds: Counter[str] = Counter()
    for number, row in enumerate(load_rows(sources, limit=limit, purpose=purpose)):
        where = f"data {sources}: row {number}"
        if _is_unlabelled(row, columns) and judge is not None:
            kinds["unlabelled"] += 1
            cases = from_unlabelled(row, columns, where=where, name=f"row {number}")
            unlabelled |= dict(enumerate(cases, start=len(answers)))
            found = [
                LabelledAnswer(response=case.response, reference=case.reference, label=False)
                for case in cases
            ]
        else:
            rng = random.Random(f"{seed}/{number}")
            num = wrong_per_question
            kind, found = _from_row(row, columns, where=where, rng=rng, num_wrong=num)
            kinds[kind] += 1
        answers += [replace(answer, row=number) for answer in found]
    if judge is not None:
        judged = _with_verdicts(answers, unlabelled, judge)
        if len(judged) < len(answers):
            kinds["unjudged (left out)"] = len(answers) - len(judged)
        answers = judged
    return answers, dict(kinds)


def _with_verdicts(
    answers: list[LabelledAnswer], unlabelled: dict[int, JudgedAnswer], judge: JudgeFunction
) -> list[LabelledAnswer]:
    """The answers with the judge's verdicts on the unlabelled ones, without those it left open."""
    verdicts = dict(zip(unlabelled, judge(list(unlabelled.values())), strict=True))
    labels = [verdicts.get(place, answer.label) for place, answer in enumerate(answers)]
    return [
        replace(answer, label=label)
        for answer, label in zip(answers, labels, strict=True)
        if label is not None
    ]


def _is_unlabelled(row: Row, columns: AnswerColumns) -> bool:
    is_question = "options" in row and "answer_idx" in row
    labelled = columns.label in row or is_question or "trajectory" in row or "judge" in row
    return (columns.response in row or "completion" in row) and not labelled


def _response(row: Row, columns: AnswerColumns, where: str) -> str:
    """The response of a row, or the final response of its completion if that has the format."""
    if columns.response in row or "completion" not in row:
        return text_field(row, columns.response, where=where)
    completion = text_field(
        row | {"completion": _last_turn(row["completion"])}, "completion", where=where
    )
    parsed = parse_response(completion)
    return parsed.final if parsed and parsed.final else completion


def _last_turn(value: Any) -> Any:
    """The content of the last of a list of turns; any other value as it is."""
    is_turns = isinstance(value, list) and value and isinstance(value[-1], dict)
    return value[-1].get("content") if is_turns else value


def _from_row(
    row: Row,
    columns: AnswerColumns,
    *,
    where: str,
    rng: random.Random,
    num_wrong: int,
) -> tuple[str, list[LabelledAnswer]]:
    """The kind of a row that has labels, and its answers."""
    if columns.label in row:
        answer = LabelledAnswer(
            response=_response(row, columns, where),
            reference=text_field(row, columns.reference, where=where),
            label=_label(row[columns.label], where),
        )
        return "labelled", [answer]
    if "trajectory" in row:
        return "search record", from_search_record(row, where=where)
    if "options" in row and "answer_idx" in row:
        return "exam question", from_question(
            row,
            where=where,
            rng=rng,
            num_wrong=num_wrong,
        )
    if "judge" in row:
        return "judged rollout", from_judged_rollout(row, where=where)
    raise ValueError(
        f"{where}: has {', '.join(sorted(row))[:200]}; needs "
        f"{columns.response}+{columns.reference}+{columns.label} (--columns names other keys), "
        "completion in place of the response, question+options+answer_idx, trajectory, or "
        "response+answer+judge; give llm.model to have rows without a label judged"
    )


def from_question(
    row: dict[str, Any],
    *,
    where: str,
    rng: random.Random,
    num_wrong: int,
) -> list[LabelledAnswer]:
    """Right and wrong answers from an exam question, equally many and phrased alike.

    Raises:
        ValueError: the options are too few, blank or all alike, or lack the answer.
    """
    options = row["options"]
    letter = row["answer_idx"]
    if not isinstance(options, dict) or len(options) < 2 or letter not in list(options):
        raise ValueError(f"{where}: answer_idx {letter!r} is not among at least two options")
    # tables fill the options that a row lacks with None
    texts = {key: "" if text is None else str(text).strip() for key, text in options.items()}
    reference = texts.pop(letter)
    others = sorted(set(texts.values()) - {reference, ""})
    if not reference or not others:
        raise ValueError(f"{where}: its options are blank or all alike")
    if num_wrong > len(others):
        wrong = [others[n % len(others)] for n in range(num_wrong)]
    else:
        wrong = rng.sample(others, num_wrong)
    answers = []
    for text in wrong:
        phrase = rng.choice(PHRASES)
        response = phrase.format(text)
        answers.append(
            LabelledAnswer(
                response=response,
                reference=reference,
                label=False,
            )
        )
        phrase = rng.choice(PHRASES)
        response = phrase.format(_reworded(reference, rng))
        answers.append(
            LabelledAnswer(
                response=response,
                reference=reference,
                label=True,
            )
        )
    return answers


def _reworded(text: str, rng: random.Random) -> str:
    """A variant of an answer: other case, without an article, or without brackets."""
    short = text.upper() if len(text) < 12 else text.capitalize()
    forms = [text, text.lower(), short, text.rstrip(".")]
    forms += [text[len(a) :] for a in ("The ", "A ", "An ") if text.startswith(a)]
    if "(" in text and text.endswith(")"):
        forms.append(text[: text.index("(")].strip(string.whitespace) or text)
    return rng.choice(forms)


def from_search_record(row: dict[str, Any], *, where: str) -> list[LabelledAnswer]:
    """The conclusions of a search with the judge's verdicts; steps without one are left out."""
    reference = text_field(row, ANSWER_KEY, where=where)
    steps = row["trajectory"]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ValueError(f"{where}: its trajectory is not a list of objects")
    return [
        LabelledAnswer(
            response=str(step["conclusion"]),
            reference=reference,
            label=step["verdict"],
        )
        for step in steps
        if isinstance(step.get("verdict"), bool) and str(step.get("conclusion", "")).strip()
    ]


def from_judged_rollout(row: dict[str, Any], *, where: str) -> list[LabelledAnswer]:
    """The final response of a judged rollout; none when its format is broken."""
    parsed = parse_response(text_field(row, "response", where=where))
    if parsed is None or not parsed.final:
        return []
    reference = text_field(row, "answer", where=where)
    label = _label(row["judge"], where)
    return [
        LabelledAnswer(
            response=parsed.final,
            reference=reference,
            label=label,
        )
    ]


def from_unlabelled(
    row: Row, columns: AnswerColumns, *, where: str, name: str
) -> list[JudgedAnswer]:
    """A response and its reference, or a rollout's final response, for an LLM to judge."""
    keys = (QUESTION_KEY, "question", "prompt")
    question = next((str(_last_turn(row[key])) for key in keys if key in row), "(not given)")
    if columns.reference in row:
        response = _response(row, columns, where)
        reference = text_field(row, columns.reference, where=where)
        return [JudgedAnswer(name, question, reference, response)]
    rollout = from_judged_rollout(row | {"judge": False}, where=where)
    return [JudgedAnswer(name, question, answer.reference, answer.response) for answer in rollout]


def _label(value: Any, where: str) -> bool:
    if value is True or value is False or value in (0, 1):
        return bool(value)
    raise ValueError(f"{where}: label is {value!r}: give true or false")


def tokenise(
    answers: list[LabelledAnswer],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_tokens: int,
) -> tuple[list[LabelledIds], int]:
    """Token ids of the verifier's input for each answer.

    Returns:
        The rows, and the number of responses that were cut in the middle to fit `max_tokens`.
    """
    rows = []
    num_cut = 0
    for answer in answers:
        ids, cut = verifier_input(
            tokenizer,
            answer.response,
            answer.reference,
            template=template,
            max_tokens=max_tokens,
        )
        rows.append(
            LabelledIds(
                token_ids=ids,
                label=int(answer.label),
                row=answer.row,
            )
        )
        num_cut += cut > 0
    return rows, num_cut
