"""`verippo problems`: open-ended, verifiable problems from multiple-choice exam questions.

Source: arXiv 2412.18925, section 2.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..core.llm.client import LLM
from ..core.llm.journal import content_key
from ..core.text.choices import extract_choice
from ..core.text.data import ANSWER_KEY, QUESTION_KEY, Purpose, load_rows, text_field
from .asker import Asker
from .config import ProblemsConfig
from .decontaminate import normalise, overlaps
from .items import Work, finish_items, write_json
from .parse import PROBLEM_SCHEMA, parse_judgement, parse_problem
from .results import ItemResult
from .summary_report import (
    NUM_EXAMPLES,
    Exit,
    Table,
    faults_table,
    funnel_table,
    reasons_table,
    report_unfinished,
    tokens_table,
    write_report,
)
from .templates import Prompts
from .wording import picture_phrase, text_length

DataRow = dict[str, Any]
"""A row of the input or output: the source's own keys beside ours."""

STEPS = (
    "duplicates",
    "length",
    "one right option",
    "absent picture",
    "contaminated question",
    "difficulty",
    "judgement",
    "rewriting",
    "contaminated problem",
)
STEP_OF_PROMPT = {"choice": "difficulty", "judge": "judgement", "rewrite": "rewriting"}
SHARES = "shares 64 characters with an evaluation item"
ASKS_FOR_FALSE = re.compile(
    r"\bexcept\b(?! for)|\bNOT\b|\b(?i:least likely)\b"
    r"|\b(?i:which|all)\b[^.?]{0,80}\b(?:is|are|was|were) not\b"
    r"|\b(?i:is|are|was|were) (?i:false|incorrect|untrue|wrong)\b"
    r"|\b(?i:false|incorrect|untrue|wrong) (?:statement|option)"
    r"|不正确|错误的|除外|不包括|不属于|不符合|不是|不宜|不应",
)
STANDS_FOR_SEVERAL = re.compile(
    r"\b(?:all|none|both|any|neither) (?:of )?(?:the )?(?:above|these|options)\b"
    r"|^[A-E](?:\s*(?:,|and|&|\+)\s*[A-E])+\b|以上",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class ExamQuestion:
    """A multiple-choice question with one right option."""

    question: str
    options: dict[str, str]
    letter: str
    """Letter of the right option."""

    @property
    def answer(self) -> str:
        """Text of the right option."""
        return self.options[self.letter]

    @property
    def content(self) -> list[Any]:
        """Everything that a result depends on."""
        return [self.question, self.options, self.letter]


def problems(config: ProblemsConfig, *, resolved: dict[str, Any]) -> Path:
    """Writes problems.json, its halves problems_search.json and problems_rl.json, and the report.

    Args:
        config: the command's configuration.
        resolved: the configuration as plain values, written to config.yaml.

    Returns:
        The output folder.

    Raises:
        ValueError: rows, evaluation files or templates cannot be used.
        SystemExit: the budget was spent before all questions were finished.
    """
    prompts = Prompts(config.language, config.prompts)
    rows = load_rows(config.data, limit=config.limit)
    questions = [
        exam_question(row, where=f"data {config.data}: row {number}")
        for number, row in enumerate(rows)
    ]
    evaluation = evaluation_texts(config.decontaminate)
    pools = {
        "choice": _pool("choice", config.mix.choice),
        "general": _pool("general", config.mix.general),
    }
    exits = first_filters(questions, evaluation, config)
    asked = [number for number, item in enumerate(exits) if item is None]
    work = Work(
        run=partial(convert, config),
        content=lambda question: question.content,
        settings=["problems", config.judge],
        prompts=prompts,
        others=config.difficulty.models,
    )
    results = finish_items(config, [questions[n] for n in asked], work, resolved=resolved)
    found = _sort_out(dict(zip(asked, results, strict=True)), exits, evaluation)
    written = [
        rows[n] | {QUESTION_KEY: texts["question"], ANSWER_KEY: texts["answer"]}
        for n, texts in found.items()
    ]
    folder = Path(config.output).expanduser()
    tables = write_problems(folder, config, written, pools, evaluation)
    left = [
        (f"{item.step}: {item.outcome}", item.reason, questions[n].question)
        for n, item in enumerate(exits)
        if item
    ]
    tables = [funnel_table(STEPS, exits), reasons_table("Why questions left", left), *tables]
    tables.append(faults_table(results))
    tables.append(tokens_table(results, [config.llm, *config.difficulty.models]))
    write_report(folder, title="Verifiable problems", tables=tables)
    report_unfinished(results)
    return folder


def _sort_out(
    results: dict[int, ItemResult], exits: list[Exit | None], evaluation: Sequence[str]
) -> dict[int, dict[str, str]]:
    """The texts of the problems that may be used, by question; notes the others in `exits`."""
    found = {}
    for number, result in results.items():
        if result.outcome == "done":
            found[number] = result.texts
        else:
            step = STEP_OF_PROMPT[result.trajectory[-1].calls[-1].prompt]
            exits[number] = Exit(step, result.outcome, result.reason or "")
    texts = [f"{written['question']} {written['answer']}" for written in found.values()]
    for number, shared in zip(list(found), contaminated(texts, evaluation), strict=True):
        if shared:
            exits[number] = Exit("contaminated problem", "dropped", SHARES)
            del found[number]
    return found


def exam_question(row: DataRow, *, where: str) -> ExamQuestion:
    """The exam question of a row.

    Raises:
        ValueError: the row has no question, fewer than two options, or no right one among them.
    """
    question = text_field(row, "question", where=where)
    options = row.get("options")
    letter = row.get("answer_idx")
    are_texts = isinstance(options, dict) and all(isinstance(t, str) for t in options.values())
    if not isinstance(options, dict) or len(options) < 2 or not are_texts:
        raise ValueError(f"{where}: 'options' is not an object of at least two texts")
    if not isinstance(letter, str) or letter not in options:
        raise ValueError(
            f"{where}: answer_idx {letter!r} is not among the options {', '.join(options)}"
        )
    return ExamQuestion(question=question, options=options, letter=letter)


def evaluation_texts(sources: str | None) -> list[str]:
    """Every question and option of the evaluation files.

    Raises:
        ValueError: a row has no question.
    """
    texts = []
    for number, row in enumerate(_rows("decontaminate", sources, purpose="test")):
        others = [key for key in (QUESTION_KEY, "Question") if key in row]
        key = others[0] if others and "question" not in row else "question"
        options = row.get("options") or {}
        texts.append(text_field(row, key, where=f"decontaminate {sources}: row {number}"))
        texts += map(str, options.values() if isinstance(options, dict) else options)
    return texts


def contaminated(texts: Sequence[str], evaluation: Sequence[str]) -> list[bool]:
    """Whether each text shares 64 characters with an evaluation text, or equals a shorter one."""
    whole = set(map(normalise, evaluation))
    return [
        shares or normalise(text) in whole
        for text, shares in zip(texts, overlaps(texts, evaluation), strict=True)
    ]


def first_filters(
    questions: Sequence[ExamQuestion], evaluation: Sequence[str], config: ProblemsConfig
) -> list[Exit | None]:
    """Filters that need no model: duplicates, length, one right option, pictures, contamination."""
    exits: list[Exit | None] = []
    seen: set[tuple[str, ...]] = set()
    shared = contaminated([question.question for question in questions], evaluation)
    for question, shares in zip(questions, shared, strict=True):
        options = sorted(map(normalise, question.options.values()))
        same = (normalise(question.question), *options)
        sentences = re.split(r"(?<=[.?!。？！])\s*", question.question.strip())
        last_sentence = [sentence for sentence in sentences if sentence][-1]
        found: tuple[str, str] | None = None
        if same in seen:
            found = ("duplicates", "the same question with the same options came before")
        elif text_length(question.question) < config.min_length:
            found = ("length", f"shorter than {config.min_length} characters")
        elif config.unique and ASKS_FOR_FALSE.search(last_sentence):
            found = ("one right option", "asks for what is false")
        elif config.unique and STANDS_FOR_SEVERAL.search(question.answer):
            found = ("one right option", "its right option stands for several")
        elif picture_phrase(question.question):
            found = ("absent picture", "refers to a picture that is not in the text")
        elif shares:
            found = ("contaminated question", SHARES)
        seen.add(same)
        exits.append(Exit(found[0], "dropped", found[1]) if found else None)
    return exits


async def convert(
    config: ProblemsConfig,
    question: ExamQuestion,
    asker: Asker,
    small: Sequence[LLM],
) -> ItemResult:
    """Difficulty, judgement and rewriting, until the question is dropped or its problem written."""
    if small:
        easy = await all_answer(question, asker, small, seed=config.seed)
        asker.close_step("difficulty")
        if easy:
            reason = f"all of {len(small)} models answer it correctly"
            return ItemResult(outcome="dropped", reason=reason)
    values: dict[str, Any] = {"question": question.question, "options": question.options}
    values |= {"letter": question.letter, "answer": question.answer}
    if config.judge:
        judgement = await asker.ask("judge", values, parse_judgement, judging=True)
        asker.close_step("judgement")
        if judgement != "pass":
            return ItemResult(outcome="dropped", reason=judgement)
    values |= {"question_key": QUESTION_KEY, "answer_key": ANSWER_KEY}
    text, answer = await asker.ask("rewrite", values, parse_problem, schema=PROBLEM_SCHEMA)
    asker.close_step("rewriting")
    return ItemResult(outcome="done", texts={"question": text, "answer": answer})


async def all_answer(
    question: ExamQuestion,
    asker: Asker,
    small: Sequence[LLM],
    *,
    seed: int,
) -> bool:
    """Whether every small model picks the right option.

    Each sees the options in an order of its own; none is asked after one has failed.
    """
    for number, llm in enumerate(small):
        rng = random.Random(f"{seed}/{content_key(question.content)}/{number}")
        order = rng.sample(list(question.options), len(question.options))
        letters = string.ascii_uppercase[: len(order)]
        texts = [question.options[key] for key in order]
        options = dict(zip(letters, texts, strict=True))
        values = {"question": question.question, "options": options}
        parse = partial(extract_choice, options=options)
        picked = await asker.ask("choice", values, parse, draw=number, judging=True, llm=llm)
        if picked is None or order[letters.index(picked)] != question.letter:
            return False
    return True


def _pool(kind: str, source: str | None) -> list[DataRow]:
    """The rows of a source of the mix, as problems."""
    name = f"mix.{kind}"
    return [
        as_problem(row, where=f"{name} {source}: row {number}")
        for number, row in enumerate(_rows(name, source))
    ]


def _rows(name: str, sources: str | None, *, purpose: Purpose = "train") -> list[DataRow]:
    """The rows of an option's sources; errors name the option."""
    try:
        return load_rows(sources, purpose=purpose) if sources else []
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def as_problem(row: DataRow, *, where: str) -> DataRow:
    """A row as a problem: unchanged, or an exam question with its options as the last lines."""
    if QUESTION_KEY in row and "options" not in row:
        return row | {key: text_field(row, key, where=where) for key in (QUESTION_KEY, ANSWER_KEY)}
    exam = exam_question(row, where=where)
    lines = [exam.question, *(f"{letter}. {text}" for letter, text in exam.options.items())]
    return row | {QUESTION_KEY: "\n".join(lines), ANSWER_KEY: f"{exam.letter}. {exam.answer}"}


def write_problems(
    folder: Path,
    config: ProblemsConfig,
    rows: list[DataRow],
    pools: dict[str, list[DataRow]],
    evaluation: list[str],
) -> list[Table]:
    """Splits the problems into halves by seed, adds the mix to the RL half, writes all files."""
    size = round(config.split * len(rows))
    chosen = set(random.Random(f"{config.seed}/split").sample(range(len(rows)), size))
    search_half = [row for n, row in enumerate(rows) if n in chosen]
    rl_half = [row for n, row in enumerate(rows) if n not in chosen]
    num_converted = len(rl_half)
    sizes: list[tuple[Any, ...]] = [("search", size), ("RL, converted", num_converted)]
    taken = {normalise(row["question"]) for row in rows}
    ratios = {"choice": config.mix.choice_ratio, "general": config.mix.general_ratio}
    for kind, pool in pools.items():
        if not pool:
            continue
        wanted = round(ratios[kind] * num_converted)
        shared = contaminated([row[QUESTION_KEY] for row in pool], evaluation)
        usable = {
            row[QUESTION_KEY]: row
            for row, shares in zip(pool, shared, strict=True)
            if not shares and normalise(str(row.get("question"))) not in taken
        }
        num = min(wanted, len(usable))
        drawn = random.Random(f"{config.seed}/{kind}").sample(list(usable.values()), num)
        rl_half += drawn
        note = f"wanted {wanted}, {len(usable)} of {len(pool)} could be drawn"
        sizes.append((f"RL, {kind} ({note})", len(drawn)))
    write_json(folder / "problems.json", rows)
    write_json(folder / "problems_search.json", search_half)
    write_json(folder / "problems_rl.json", rl_half)
    first = rows[:NUM_EXAMPLES]
    examples = [(row["question"], row[QUESTION_KEY], row[ANSWER_KEY]) for row in first]
    return [
        Table("Halves", ("part", "problems"), sizes),
        Table("Examples", ("exam question", "problem", "answer"), examples),
    ]
