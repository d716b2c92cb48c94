"""`verippo search`: a complex chain of thought and a response for each verifiable problem.

Source: arXiv 2412.18925, section 3.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..core.llm.client import LLM
from ..core.llm.journal import content_key
from ..core.text.data import Problem, load_problems, load_rows
from .asker import Asker
from .config import SearchConfig
from .items import Work, finish_items, write_json
from .parse import (
    CHAIN_SCHEMA,
    CONCLUDE,
    MONOLOGUE_SCHEMA,
    THINK,
    conclusion,
    extend_chain,
    parse_chain,
    parse_continuation,
    parse_monologue,
    parse_response,
    parse_truth,
)
from .results import ChainStep, ItemResult, TrajectoryStep, step_to_json
from .summary_report import (
    Table,
    faults_table,
    reasons_table,
    report_unfinished,
    tokens_table,
    write_report,
)
from .templates import STRATEGY, Prompts

TrainingRow = dict[str, Any]
"""A row of search.json: the problem's own keys, Question, Complex_CoT, Response, trajectory."""
BACKTRACKING = "backtracking"
STRATEGY_NAMES = {"chain": "initial", "label": "label_guided"}
"""Names in a trajectory of the prompts that are no strategy."""
DISAGREES = "its final response does not agree with the reference answer"


def search(config: SearchConfig, *, resolved: dict[str, Any]) -> Path:
    """Writes search.json, its two baselines, given_up.json and the report.

    Args:
        config: the command's configuration.
        resolved: the configuration as plain values, written to config.yaml.

    Returns:
        The output folder.

    Raises:
        ValueError: rows or templates cannot be used.
        SystemExit: the budget was spent before all items were finished.
    """
    work = Work(
        run=partial(_search_item, config),
        content=lambda problem: [problem.question, problem.answer],
        settings=[
            "search",
            config.max_depth,
            config.max_attempts,
            config.label_guided,
            config.min_monologue_length,
        ],
        prompts=Prompts(config.language, config.prompts),
    )
    rows = load_rows(config.data, limit=config.limit)
    problems = load_problems(config.data, limit=config.limit)
    results = finish_items(config, problems, work, resolved=resolved)
    folder = Path(config.output).expanduser()
    _write_rows(folder, rows, problems, results)
    failed = [
        (result.outcome, result.reason, problem.question)
        for problem, result in zip(problems, results, strict=True)
        if result.reason is not None
    ]
    tables = [*outcome_tables(results), faults_table(results), tokens_table(results, [config.llm])]
    tables.append(reasons_table("Failures", failed))
    write_report(folder, title="Search for reasoning", tables=tables)
    report_unfinished(results)
    return folder


def _write_rows(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    problems: Sequence[Problem],
    results: Sequence[ItemResult],
) -> None:
    solved: list[TrainingRow] = []
    given_up = []
    for row, problem, result in zip(rows, problems, results, strict=True):
        trajectory = [step_to_json(step) for step in result.trajectory]
        if result.outcome == "solved":
            texts = {
                "Question": problem.question,
                "Complex_CoT": result.texts["reasoning"],
                "Response": result.texts["response"],
            }
            solved.append({**row, **texts, "trajectory": trajectory})
        elif result.outcome == "given up":
            given_up.append({**row, "trajectory": trajectory})
    write_json(folder / "search.json", solved)
    write_json(folder / "given_up.json", given_up)
    write_json(folder / "search_simple_cot.json", [baseline(row, kind="simple") for row in solved])
    write_json(folder / "search_no_cot.json", [baseline(row, kind="no") for row in solved])


async def _search_item(
    config: SearchConfig,
    problem: Problem,
    asker: Asker,
    _: Sequence[LLM],
) -> ItemResult:
    return await search_one(problem, asker, config)


async def search_one(problem: Problem, asker: Asker, config: SearchConfig) -> ItemResult:
    """Searches until the verifier accepts a conclusion, then has the training texts written.

    The problem is given up if the verifier accepts no conclusion, or none of the final responses.

    The initial chain is asked for once, whatever the number of attempts; equal conclusions are
    judged once; nothing is asked after the first accepted one.
    """
    seed = f"{config.seed}/{content_key(problem.question, problem.answer)}"
    initial, accepted = await _extend(problem, asker, "chain", [], attempt=0, depth=0)
    chain = initial
    for attempt in range(1, config.max_attempts + 1):
        for depth in range(1, config.max_depth + 1):
            if not accepted:
                first = depth == 1
                names = [n for n in asker.prompts.strategies if not (first and n == BACKTRACKING)]
                rng = random.Random(f"{seed}/{attempt}/{depth}")
                prompt = STRATEGY + rng.choice(names)
                before = initial if first else chain
                chain, accepted = await _extend(
                    problem, asker, prompt, before, attempt=attempt, depth=depth
                )
    if not accepted and config.label_guided:
        attempt = config.max_attempts + 1
        chain, accepted = await _extend(problem, asker, "label", chain, attempt=attempt, depth=1)
    if not accepted:
        return ItemResult(outcome="given up")
    values = {"question": problem.question, "chain": chain_text(chain)}
    parse = partial(parse_monologue, min_length=config.min_monologue_length)
    reasoning = await asker.ask("monologue", values, parse, schema=MONOLOGUE_SCHEMA)
    asker.close_step("monologue")
    response, agrees = await _respond(problem, asker, reasoning)
    if not agrees:
        return ItemResult(outcome="given up", reason=DISAGREES)
    return ItemResult(outcome="solved", texts={"reasoning": reasoning, "response": response})


async def _respond(problem: Problem, asker: Asker, reasoning: str) -> tuple[str, bool]:
    """The final response and the verdict on it; a rejected one is written anew."""
    values = {"question": problem.question, "reasoning": reasoning}
    response, agrees = "", False
    for draw in range(asker.max_asks):
        response = await asker.ask("response", values, parse_response, draw=draw)
        if agrees := await _verdict(problem, asker, response):
            break
    asker.close_step("response", verdict=agrees)
    return response, agrees


async def _verdict(problem: Problem, asker: Asker, given: str) -> bool:
    values = {"question": problem.question, "conclusion": given, "answer": problem.answer}
    return await asker.ask("verdict", values, parse_truth, judging=True)


async def _extend(
    problem: Problem,
    asker: Asker,
    prompt: str,
    chain: list[ChainStep],
    *,
    attempt: int,
    depth: int,
) -> tuple[list[ChainStep], bool]:
    """The chain with what a prompt adds to it, and the verdict on its conclusion."""
    values = {"question": problem.question}
    if chain:
        values["chain"] = chain_text(chain)
    if prompt == "label":
        values["answer"] = problem.answer
    parse = parse_continuation if chain else parse_chain
    new = await asker.ask(prompt, values, parse, draw=attempt, schema=CHAIN_SCHEMA)
    concluded = conclusion(new)
    accepted = await _verdict(problem, asker, concluded)
    asker.close_step(
        STRATEGY_NAMES.get(prompt, prompt.removeprefix(STRATEGY)),
        attempt=attempt,
        depth=depth,
        chain=new,
        conclusion=concluded,
        verdict=accepted,
    )
    return extend_chain(chain, new), accepted


def chain_text(chain: list[ChainStep]) -> str:
    """The chain as prompts show it: a JSON object per line."""
    return "\n".join(json.dumps(step, ensure_ascii=False) for step in chain)


def baseline(row: TrainingRow, *, kind: Literal["simple", "no"]) -> TrainingRow:
    """The training row of the paper's comparisons, made from a finished one.

    "simple" holds the initial chain's thoughts and conclusion, as they were before any verdict;
    "no" holds the response without reasoning.
    """
    others = {key: value for key, value in row.items() if key != "trajectory"}
    if kind == "no":
        return others | {"Complex_CoT": ""}
    chain = row["trajectory"][0]["chain"]
    thoughts = [step["content"] for step in chain if step["action"] == THINK]
    concluded = [step["content"] for step in chain if step["action"] == CONCLUDE]
    return others | {"Complex_CoT": "\n\n".join(thoughts), "Response": concluded[-1]}


def outcome_tables(results: Sequence[ItemResult]) -> list[Table]:
    """Outcomes, what each strategy found, verdicts, and in which attempt items were solved."""
    steps = [step for result in results for step in result.trajectory]
    judged = [step for step in steps if step.conclusion is not None]
    responses = Counter(step.verdict for step in steps if step.strategy == "response")
    drawn = Counter(step.strategy for step in judged)
    accepted = Counter(step.strategy for step in judged if step.verdict)
    solving = [_accepted_step(result) for result in results if result.outcome == "solved"]
    ends = Counter(result.outcome for result in results if result.outcome != "solved")
    ends.update(f"solved: {step.strategy}" for step in solving)
    assert sum(ends.values()) == len(results), "an item has vanished"
    tries = Counter(step.attempt or 0 for step in solving if step.strategy != "label_guided")
    verdict_calls = [call for step in steps for call in step.calls if call.prompt == "verdict"]
    num_accepted = sum(accepted.values())
    verdicts = [
        ("True", num_accepted),
        ("False", len(judged) - num_accepted),
        ("unparsed", sum(len(call.faults) for call in verdict_calls)),
    ]
    outcomes = [*ends.most_common(), ("all", len(results))]
    strategies = [(name, num, accepted[name]) for name, num in drawn.most_common()]
    attempts = [(f"attempt {n}" if n else "initial chain", tries[n]) for n in sorted(tries)]
    return [
        Table("Outcomes", ("outcome", "items"), outcomes),
        Table("Strategies", ("strategy", "drawn", "right"), strategies),
        Table("Verdicts", ("verdict", "number"), verdicts),
        Table("Attempts", ("solved in", "items"), attempts),
        Table(
            "Final responses",
            ("verdict", "items"),
            [("True", responses[True]), ("False", responses[False])],
        ),
    ]


def _accepted_step(result: ItemResult) -> TrajectoryStep:
    return next(step for step in result.trajectory if step.verdict)
