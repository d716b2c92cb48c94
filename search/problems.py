"""`verippo problems`: multiple-choice exam questions -> open-ended problems whose answers can be checked
(arXiv 2412.18925, section 2)."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..core.llm.client import LLM
from ..core.llm.journal import content_key
from ..core.text.data import ANSWER_KEY, QUESTION_KEY, load_rows, text_field
from .asker import Asker
from .config import ProblemsConfig
from .decontaminate import normalise, overlaps
from .items import Result, finish_items, write_json
from .parse import PROBLEM_SCHEMA, parse_choice, parse_judgement, parse_problem
from .summary_report import (
    NUM_EXAMPLES,
    Table,
    end,
    funnel_table,
    reasons_table,
    tokens_table,
    write_report,
)
from .templates import Prompts

Row = dict[str, Any]

STEPS = (
    "duplicates",
    "length",
    "one right option",
    "contaminated question",
    "difficulty",
    "judgement",
    "rewriting",
    "contaminated problem",
)
STEP_OF = {"choice": "difficulty", "judge": "judgement", "rewrite": "rewriting"}
"""The step of each prompt."""
SHARES = "shares 64 characters with an evaluation item"
ASKS_FOR_FALSE = re.compile(
    r"\bexcept\b(?! for)|\bNOT\b|\b(?i:least likely)\b|\b(?i:which|all)\b[^.?]{0,80}\b(?:is|are|was|were) not\b"
    r"|\b(?i:is|are|was|were) (?i:false|incorrect|untrue|wrong)\b|\b(?i:false|incorrect|untrue|wrong) (?:statement|option)"
    r"|不正确|错误的|除外|不包括|不属于|不符合|不是|不宜|不应",
)
STANDS_FOR_SEVERAL = re.compile(
    r"\b(?:all|none|both|any|neither) (?:of )?(?:the )?(?:above|these|options)\b|^[A-E](?:\s*(?:,|and|&|\+)\s*[A-E])+\b|以上",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class ExamQuestion:
    """A multiple-choice question with one right option."""

    question: str
    options: dict[str, str]
    letter: str

    @property
    def answer(self) -> str:
        return self.options[self.letter]

    @property
    def content(self) -> list[Any]:
        return [self.question, self.options, self.letter]


class Fate(NamedTuple):
    """Where a question left the funnel, how (dropped, failed or unreached) and why."""

    step: str
    outcome: str
    reason: str


def problems(config: ProblemsConfig, *, resolved: dict[str, Any]) -> Path:
    """Writes problems.json, its halves problems_search.json and problems_rl.json and the report, and returns the folder.

    Raises ValueError for rows, evaluation files or templates that cannot be used; ends with status 1 when the budget is spent.
    """
    prompts, rows = (
        Prompts(config.language, config.prompts),
        load_rows(config.data, limit=config.limit),
    )
    questions = [
        exam_question(row, where=f"data {config.data}: row {number}")
        for number, row in enumerate(rows)
    ]
    evaluation = evaluation_texts(config.decontaminate)
    pools = {
        kind: _pool(kind, source)
        for kind, source in (("choice", config.mix.choice), ("general", config.mix.general))
    }
    fates = first_filters(questions, evaluation, config)

    async def work(question: ExamQuestion, asker: Asker, small: Sequence[LLM]) -> Result:
        return await convert(question, asker, small, config)

    asked = [number for number, fate in enumerate(fates) if fate is None]
    results = finish_items(
        config,
        [questions[number] for number in asked],
        work,
        content=lambda question: question.content,
        prompts=prompts,
        resolved=resolved,
        settings=["problems", config.judge],
        others=config.difficulty.models,
    )
    found = {
        number: result
        for number, result in zip(asked, results, strict=True)
        if result["outcome"] == "done"
    }
    for number, result in zip(asked, results, strict=True):
        if number not in found:
            step = STEP_OF[result["trajectory"][-1]["calls"][-1]["prompt"]]
            fates[number] = Fate(step, result["outcome"], result["reason"])
    texts = [f"{result['question']} {result['answer']}" for result in found.values()]
    for number, shared in zip(list(found), contaminated(texts, evaluation), strict=True):
        if shared:
            fates[number] = Fate("contaminated problem", "dropped", SHARES)
            del found[number]
    records = [
        rows[n] | {QUESTION_KEY: result["question"], ANSWER_KEY: result["answer"]}
        for n, result in found.items()
    ]
    folder = Path(config.output).expanduser()
    tables = write_problems(folder, config, records, pools, evaluation)
    left = [
        (f"{fate.step}: {fate.outcome}", fate.reason, questions[n].question)
        for n, fate in enumerate(fates)
        if fate
    ]
    tables = [funnel_table(STEPS, fates), reasons_table("Why questions left", left), *tables]
    models = [config.llm, *config.difficulty.models]
    write_report(
        folder, title="Verifiable problems", tables=[*tables, tokens_table(results, models)]
    )
    end(results)
    return folder


def exam_question(row: Row, *, where: str) -> ExamQuestion:
    """Raises ValueError naming the place unless the row has a question, at least two options, and a right one among them."""
    question, options, letter = (
        text_field(row, "question", where=where),
        row.get("options"),
        row.get("answer_idx"),
    )
    if (
        not isinstance(options, dict)
        or len(options) < 2
        or not all(isinstance(text, str) for text in options.values())
    ):
        raise ValueError(f"{where}: 'options' is not an object of at least two texts")
    if not isinstance(letter, str) or letter not in options:
        raise ValueError(
            f"{where}: answer_idx {letter!r} is not among the options {', '.join(options)}"
        )
    return ExamQuestion(question=question, options=options, letter=letter)


def evaluation_texts(sources: str | None) -> list[str]:
    """Every question and every option of the evaluation files. Raises ValueError naming a row without a question."""
    texts = []
    for number, row in enumerate(_rows("decontaminate", sources)):
        key = next(
            (key for key in (QUESTION_KEY, "Question") if key in row and "question" not in row),
            "question",
        )
        options = row.get("options") or {}
        texts.append(text_field(row, key, where=f"decontaminate {sources}: row {number}"))
        texts += map(str, options.values() if isinstance(options, dict) else options)
    return texts


def contaminated(texts: Sequence[str], evaluation: Sequence[str]) -> list[bool]:
    """Whether each shares 64 characters in a row with an evaluation text, or is one that is shorter."""
    whole = set(map(normalise, evaluation))
    return [
        shares or normalise(text) in whole
        for text, shares in zip(texts, overlaps(texts, evaluation), strict=True)
    ]


def first_filters(
    questions: Sequence[ExamQuestion], evaluation: Sequence[str], config: ProblemsConfig
) -> list[Fate | None]:
    """What needs no model: duplicates, length, one right option, decontamination."""
    fates: list[Fate | None] = []
    seen: set[tuple[str, ...]] = set()
    for question, shares in zip(
        questions, contaminated([q.question for q in questions], evaluation), strict=True
    ):
        same = (normalise(question.question), *sorted(map(normalise, question.options.values())))
        asked = [
            part for part in re.split(r"(?<=[.?!。？！])\s*", question.question.strip()) if part
        ][-1]
        fate = None
        if same in seen:
            fate = Fate(
                "duplicates", "dropped", "the same question with the same options came before"
            )
        elif len(question.question) < config.min_length:
            fate = Fate("length", "dropped", f"shorter than {config.min_length} characters")
        elif config.unique and ASKS_FOR_FALSE.search(asked):
            fate = Fate("one right option", "dropped", "asks for what is false")
        elif config.unique and STANDS_FOR_SEVERAL.search(question.answer):
            fate = Fate("one right option", "dropped", "its right option stands for several")
        elif shares:
            fate = Fate("contaminated question", "dropped", SHARES)
        seen.add(same)
        fates.append(fate)
    return fates


async def convert(
    question: ExamQuestion, asker: Asker, small: Sequence[LLM], config: ProblemsConfig
) -> Result:
    """Difficulty, judgement, rewriting: as few calls as it takes to drop the question or to have its problem."""
    if small:
        easy = await all_answer(question, asker, small, seed=config.seed)
        asker.close_step("difficulty")
        if easy:
            return {
                "outcome": "dropped",
                "reason": f"all of {len(small)} models answer it correctly",
            }
    shown: dict[str, Any] = {"question": question.question, "options": question.options}
    shown |= {"letter": question.letter, "answer": question.answer}
    if config.judge:
        judgement = await asker.ask("judge", shown, parse_judgement, judging=True)
        asker.close_step("judgement")
        if judgement != "pass":
            return {"outcome": "dropped", "reason": judgement}
    keys = {"question_key": QUESTION_KEY, "answer_key": ANSWER_KEY}
    text, answer = await asker.ask("rewrite", shown | keys, parse_problem, schema=PROBLEM_SCHEMA)
    asker.close_step("rewriting")
    return {"outcome": "done", "question": text, "answer": answer}


async def all_answer(
    question: ExamQuestion, asker: Asker, small: Sequence[LLM], *, seed: int
) -> bool:
    """Whether every small model picks the right option; each sees its own order of them, and none is asked after one fails."""
    for number, llm in enumerate(small):
        rng = random.Random(f"{seed}/{content_key(question.content)}/{number}")
        order = rng.sample(list(question.options), len(question.options))
        letters = string.ascii_uppercase[: len(order)]
        options = {
            letter: question.options[key] for letter, key in zip(letters, order, strict=True)
        }
        values = {"question": question.question, "options": options}
        said = await asker.ask(
            "choice",
            values,
            partial(parse_choice, letters=letters),
            draw=number,
            judging=True,
            llm=llm,
        )
        if said is None or order[letters.index(said)] != question.letter:
            return False
    return True


def _pool(kind: str, source: str | None) -> list[Row]:
    """The rows of a source of the mix, as problems."""
    name = f"mix.{kind}"
    return [
        as_problem(row, where=f"{name} {source}: row {number}")
        for number, row in enumerate(_rows(name, source))
    ]


def _rows(name: str, sources: str | None) -> list[Row]:
    """Of the field `name`, which its errors name."""
    try:
        return load_rows(sources) if sources else []
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def as_problem(row: Row, *, where: str) -> Row:
    """A row unconverted: in the published format as it is; an exam question with its options as the question's last lines."""
    if QUESTION_KEY in row and "options" not in row:
        return row | {key: text_field(row, key, where=where) for key in (QUESTION_KEY, ANSWER_KEY)}
    exam = exam_question(row, where=where)
    lines = [exam.question, *(f"{letter}. {text}" for letter, text in exam.options.items())]
    return row | {QUESTION_KEY: "\n".join(lines), ANSWER_KEY: f"{exam.letter}. {exam.answer}"}


def write_problems(
    folder: Path,
    config: ProblemsConfig,
    records: list[Row],
    pools: dict[str, list[Row]],
    evaluation: list[str],
) -> list[Table]:
    """Splits the problems into halves by seed, mixes the pools into the RL half, and writes all three files."""
    chosen = set(
        random.Random(f"{config.seed}/split").sample(
            range(len(records)), round(config.split * len(records))
        )
    )
    halves = [
        [row for n, row in enumerate(records) if (n in chosen) == wanted]
        for wanted in (True, False)
    ]
    sizes: list[tuple[Any, ...]] = [("search", len(halves[0])), ("RL, converted", len(halves[1]))]
    taken = {normalise(row["question"]) for row in records}
    for kind, pool in ((kind, pool) for kind, pool in pools.items() if pool):
        wanted = round(getattr(config.mix, f"{kind}_ratio") * (len(records) - len(halves[0])))
        shares = contaminated([row[QUESTION_KEY] for row in pool], evaluation)
        free = list(
            {
                row[QUESTION_KEY]: row
                for row, bad in zip(pool, shares, strict=True)
                if not bad and normalise(str(row.get("question"))) not in taken
            }.values()
        )
        drawn = random.Random(f"{config.seed}/{kind}").sample(free, min(wanted, len(free)))
        halves[1] += drawn
        sizes.append(
            (f"RL, {kind} (wanted {wanted}, {len(free)} of {len(pool)} could be drawn)", len(drawn))
        )
    for name, part in (
        ("problems", records),
        ("problems_search", halves[0]),
        ("problems_rl", halves[1]),
    ):
        write_json(folder / f"{name}.json", part)
    examples = [
        (row["question"], row[QUESTION_KEY], row[ANSWER_KEY]) for row in records[:NUM_EXAMPLES]
    ]
    return [
        Table("Halves", ("part", "problems"), sizes),
        Table("Examples", ("exam question", "problem", "answer"), examples),
    ]
