"""Rows that a verifier learns from: (response, reference, label), as they are or made from what holds them."""

from __future__ import annotations

import random
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..core.llm.judge import Case
from ..core.text.chat import parse_response
from ..core.text.data import ANSWER_KEY, QUESTION_KEY, load_rows, text_field
from ..core.text.verifier_text import verifier_ids

PHRASES = (
    "{}",
    "{}.",
    "The answer is {}.",
    "The most likely answer is {}.",
    "It is {}.",
    "This points to {}.",
)


@dataclass(frozen=True, kw_only=True)
class LabelledAnswer:
    """A final response beside the reference answer, and whether it is right."""

    response: str
    reference: str
    label: bool
    row: int = 0
    """number of the row it was made from: answers of one row are held out together"""


@dataclass(frozen=True, kw_only=True)
class LabelledIds:
    """The same as the model reads it."""

    token_ids: list[int] = field(repr=False)
    label: int
    row: int


def load_answers(
    sources: str,
    *,
    limit: int | None,
    seed: int,
    wrong_per_question: int,
    judge: Callable[[list[Case]], list[bool | None]] | None = None,
) -> tuple[list[LabelledAnswer], dict[str, int]]:
    """All labelled answers that the sources' rows hold or give, and how many rows of each kind there were.

    Each row is of one of these kinds, told by its keys; any other is a ValueError naming the row:
      response, reference, label          as it is; label is true/false or 1/0
      question, options, answer_idx       exam question: right and wrong options, as bare text and in phrases
      Ground-True Answer, trajectory      search record: each step's `conclusion` with the judge's `verdict` (True/False)
      response, answer, judge             rollout judged by a model: `judge` is true/false
      response, reference or answer       with a `judge`, which is asked for the label and shown the row's question or prompt
    """
    unlabelled: dict[int, Case] = {}
    answers: list[LabelledAnswer] = []
    found: list[LabelledAnswer]
    kinds: Counter[str] = Counter()
    for number, row in enumerate(load_rows(sources, limit=limit)):
        where = f"data {sources}: row {number}"
        rng = random.Random(f"{seed}/{number}")
        if "label" in row:
            kinds["labelled"] += 1
            texts = [text_field(row, key, where=where) for key in ("response", "reference")]
            found = [
                LabelledAnswer(
                    response=texts[0], reference=texts[1], label=_label(row["label"], where)
                )
            ]
        elif "options" in row and "answer_idx" in row and "trajectory" not in row:
            kinds["exam question"] += 1
            found = from_question(row, where=where, rng=rng, num_wrong=wrong_per_question)
        elif "trajectory" in row:
            kinds["search record"] += 1
            found = from_search_record(row, where=where)
        elif "judge" in row:
            kinds["judged rollout"] += 1
            found = from_judged_rollout(row, where=where)
        elif judge is not None and "response" in row:
            kinds["unlabelled"] += 1
            cases = from_unlabelled(row, where=where, name=f"row {number}")
            found = [
                LabelledAnswer(response=case.response, reference=case.reference, label=False)
                for case in cases
            ]
            unlabelled |= dict(enumerate(cases, start=len(answers)))
        else:
            raise ValueError(
                f"{where}: has {', '.join(sorted(row))[:200]}; needs response+reference+label, question+options+answer_idx, "
                "trajectory, or response+answer+judge; give llm.model to have rows without a label judged"
            )
        answers += [replace(answer, row=number) for answer in found]
    if judge is not None:
        labels = dict(zip(unlabelled, judge(list(unlabelled.values())), strict=True))
        given = [(answer, labels.get(place, answer.label)) for place, answer in enumerate(answers)]
        answers = [replace(answer, label=label) for answer, label in given if label is not None]
        if num_left_out := len(given) - len(answers):
            kinds["unjudged (left out)"] = num_left_out
    return answers, dict(kinds)


def from_question(
    row: dict[str, Any], *, where: str, rng: random.Random, num_wrong: int
) -> list[LabelledAnswer]:
    """As many right answers as wrong ones, phrased alike, so that the wording gives nothing away."""
    options, letter = row["options"], row["answer_idx"]
    if not isinstance(options, dict) or len(options) < 2 or letter not in list(options):
        raise ValueError(f"{where}: answer_idx {letter!r} is not among at least two options")
    texts = {
        key: "" if text is None else str(text).strip() for key, text in options.items()
    }  # tables fill gaps with None
    reference = texts.pop(letter)
    others = sorted(set(texts.values()) - {reference, ""})
    if not reference or not others:
        raise ValueError(f"{where}: its options are blank or all alike")
    wrong = (
        [others[n % len(others)] for n in range(num_wrong)]
        if num_wrong > len(others)
        else rng.sample(others, num_wrong)
    )
    answers = []
    for text in wrong:
        phrase = rng.choice(PHRASES)
        answers.append(
            LabelledAnswer(response=phrase.format(text), reference=reference, label=False)
        )
        phrase = rng.choice(PHRASES)
        answers.append(
            LabelledAnswer(
                response=phrase.format(_reworded(reference, rng)), reference=reference, label=True
            )
        )
    return answers


def _reworded(text: str, rng: random.Random) -> str:
    """The same answer in other clothes: case, an article dropped, brackets dropped."""
    forms = [
        text,
        text.lower(),
        text.upper() if len(text) < 12 else text.capitalize(),
        text.rstrip("."),
    ]
    for article in ("The ", "A ", "An "):
        if text.startswith(article):
            forms.append(text[len(article) :])
    if "(" in text and text.endswith(")"):
        forms.append(text[: text.index("(")].strip(string.whitespace) or text)
    return rng.choice(forms)


def from_search_record(row: dict[str, Any], *, where: str) -> list[LabelledAnswer]:
    """The judge's verdicts on the conclusions that the search went through; unparsed verdicts give no row."""
    reference, steps = text_field(row, ANSWER_KEY, where=where), row["trajectory"]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ValueError(f"{where}: its trajectory is not a list of objects")
    return [
        LabelledAnswer(response=str(step["conclusion"]), reference=reference, label=step["verdict"])
        for step in steps
        if isinstance(step.get("verdict"), bool) and str(step.get("conclusion", "")).strip()
    ]


def from_judged_rollout(row: dict[str, Any], *, where: str) -> list[LabelledAnswer]:
    """A rollout's final response under a model's judgement; a broken format has no final response and gives no row."""
    parsed = parse_response(text_field(row, "response", where=where))
    if parsed is None or not parsed.final:
        return []
    reference = text_field(row, "answer", where=where)
    return [
        LabelledAnswer(
            response=parsed.final, reference=reference, label=_label(row["judge"], where)
        )
    ]


def from_unlabelled(row: dict[str, Any], *, where: str, name: str) -> list[Case]:
    """A response beside its reference, or a rollout's final response beside its answer, for an LLM to judge."""
    question = next(
        (str(row[key]) for key in (QUESTION_KEY, "question", "prompt") if key in row), "(not given)"
    )
    if "reference" in row:
        response, reference = (
            text_field(row, key, where=where) for key in ("response", "reference")
        )
        return [Case(name, question, reference, response)]
    rollout = from_judged_rollout(row | {"judge": False}, where=where)
    return [Case(name, question, answer.reference, answer.response) for answer in rollout]


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
    """What the model reads of each answer, and of how many the response was cut in the middle to fit."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    rows, num_cut = [], 0
    for answer in answers:
        ids, cut = verifier_ids(
            encode, answer.response, answer.reference, template=template, max_tokens=max_tokens
        )
        rows.append(LabelledIds(token_ids=ids, label=int(answer.label), row=answer.row))
        num_cut += cut > 0
    return rows, num_cut
