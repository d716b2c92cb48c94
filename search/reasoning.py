"""`verippo search`: verifiable problems -> a complex chain of thought and a response each (arXiv 2412.18925, section 3)."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..core.llm.client import LLM
from ..core.llm.journal import content_key
from ..core.text.data import Problem, load_problems, load_rows
from .asker import Asker
from .config import SearchConfig
from .items import Result, finish_items, write_json
from .parse import (
    CHAIN_SCHEMA,
    CONCLUDE,
    MONOLOGUE_SCHEMA,
    THINK,
    Step,
    conclusion,
    joined,
    parse_chain,
    parse_monologue,
    parse_text,
    parse_truth,
)
from .summary_report import Table, end, reasons_table, tokens_table, write_report
from .templates import STRATEGY, Prompts

Record = dict[str, Any]
BACKTRACKING = "backtracking"


def search(config: SearchConfig, *, resolved: dict[str, Any]) -> Path:
    """Writes search.json, its two baselines, given_up.json and the report to the output folder, and returns the folder.

    Raises ValueError for rows or templates that cannot be used; ends with status 1 when the budget is spent.
    """
    prompts, rows = (
        Prompts(config.language, config.prompts),
        load_rows(config.data, limit=config.limit),
    )
    problems = load_problems(config.data, limit=config.limit)

    async def work(problem: Problem, asker: Asker, _: Sequence[LLM]) -> Result:
        return await search_one(problem, asker, config)

    results = finish_items(
        config,
        problems,
        work,
        content=lambda problem: [problem.question, problem.answer],
        prompts=prompts,
        resolved=resolved,
        settings=["search", config.max_depth, config.max_attempts, config.label_guided],
    )
    folder = Path(config.output).expanduser()
    records, given_up = [], []
    for row, problem, result in zip(rows, problems, results, strict=True):
        if result["outcome"] == "solved":
            texts = {"Complex_CoT": result["reasoning"], "Response": result["response"]}
            records.append(
                row | {"Question": problem.question} | texts | {"trajectory": result["trajectory"]}
            )
        elif result["outcome"] == "given up":
            given_up.append(row | {"trajectory": result["trajectory"]})
    write_json(folder / "search.json", records)
    write_json(folder / "given_up.json", given_up)
    for kind in ("simple", "no"):
        write_json(
            folder / f"search_{kind}_cot.json", [baseline(record, kind=kind) for record in records]
        )
    tables = [*outcome_tables(results), tokens_table(results, [config.llm])]
    failed = [
        (r["outcome"], r["reason"], p.question)
        for p, r in zip(problems, results, strict=True)
        if "reason" in r
    ]
    write_report(
        folder, title="Search for reasoning", tables=[*tables, reasons_table("Failures", failed)]
    )
    end(results)
    return folder


async def search_one(problem: Problem, asker: Asker, config: SearchConfig) -> Result:
    """Initial chain, then strategies until the verifier says True, then the texts that are trained on.

    As few calls as that takes: the initial chain is asked for once, whatever the number of attempts; equal conclusions are
    judged once, and nothing is asked after the first True.
    """
    question, draws = problem.question, content_key(problem.question, problem.answer)

    async def extend(
        prompt: str, chain: list[Step], *, attempt: int, depth: int
    ) -> tuple[list[Step], bool]:
        """The chain with what the prompt adds, and the verdict on its conclusion."""
        values = {"question": question} | ({"chain": shown(chain)} if chain else {})
        values |= {"answer": problem.answer} if prompt == "label" else {}
        new = await asker.ask(prompt, values, parse_chain, draw=attempt, schema=CHAIN_SCHEMA)
        values = {"question": question, "conclusion": conclusion(new), "answer": problem.answer}
        right = await asker.ask("verdict", values, parse_truth, judging=True)
        strategy = {"chain": "initial", "label": "label_guided"}.get(
            prompt, prompt.removeprefix(STRATEGY)
        )
        asker.close_step(
            strategy,
            attempt=attempt,
            depth=depth,
            chain=new,
            conclusion=conclusion(new),
            verdict=right,
        )
        return joined(chain, new), right

    initial, right = await extend("chain", [], attempt=0, depth=0)
    chain = initial
    for attempt in range(1, config.max_attempts + 1):
        for depth in range(1, config.max_depth + 1):
            if not right:
                rng = random.Random(f"{config.seed}/{draws}/{attempt}/{depth}")
                names = [
                    name for name in asker.prompts.strategies if depth > 1 or name != BACKTRACKING
                ]
                before = chain if depth > 1 else initial
                chain, right = await extend(
                    STRATEGY + rng.choice(names), before, attempt=attempt, depth=depth
                )
    if not right and config.label_guided:
        chain, right = await extend("label", chain, attempt=config.max_attempts + 1, depth=1)
    if not right:
        return {"outcome": "given up"}
    values = {"question": question, "chain": shown(chain)}
    reasoning = await asker.ask("monologue", values, parse_monologue, schema=MONOLOGUE_SCHEMA)
    asker.close_step("monologue")
    response = await asker.ask(
        "response", {"question": question, "reasoning": reasoning}, parse_text
    )
    asker.close_step("response")
    return {"outcome": "solved", "reasoning": reasoning, "response": response}


def shown(chain: list[Step]) -> str:
    """The chain as prompts show it: one JSON object a line."""
    return "\n".join(json.dumps(step, ensure_ascii=False) for step in chain)


def baseline(record: Record, *, kind: Literal["simple", "no"]) -> Record:
    """The training record of the paper's comparisons, cut from a finished one.

    simple: the initial chain's thoughts and conclusion, as they were before any verdict; no: the response without reasoning.
    """
    rest = {key: value for key, value in record.items() if key != "trajectory"}
    if kind == "no":
        return rest | {"Complex_CoT": ""}
    chain = record["trajectory"][0]["chain"]
    thoughts = "\n\n".join(step["content"] for step in chain if step["action"] == THINK)
    return rest | {
        "Complex_CoT": thoughts,
        "Response": next(s["content"] for s in reversed(chain) if s["action"] == CONCLUDE),
    }


def outcome_tables(results: Sequence[Result]) -> list[Table]:
    """How the items ended, what the strategies found, how the verifier judged, and how many attempts it took."""
    steps = [step for result in results for step in result["trajectory"]]
    judged = [step for step in steps if "verdict" in step]
    drawn, right = (
        Counter(step["strategy"] for step in part)
        for part in (judged, [s for s in judged if s["verdict"]])
    )
    found = [
        next(step for step in r["trajectory"] if step.get("verdict"))
        for r in results
        if r["outcome"] == "solved"
    ]
    ends = Counter(result["outcome"] for result in results if result["outcome"] != "solved")
    ends.update(f"solved: {step['strategy']}" for step in found)
    assert sum(ends.values()) == len(results), "an item has vanished"
    tries = Counter(step["attempt"] for step in found if step["strategy"] != "label_guided")
    unparsed = sum(
        len(call["faults"])
        for step in steps
        for call in step["calls"]
        if call["prompt"] == "verdict"
    )
    verdicts = [
        ("True", sum(right.values())),
        ("False", len(judged) - sum(right.values())),
        ("unparsed", unparsed),
    ]
    return [
        Table("Outcomes", ("outcome", "items"), [*ends.most_common(), ("all", len(results))]),
        Table(
            "Strategies",
            ("strategy", "drawn", "right"),
            [(name, num, right[name]) for name, num in drawn.most_common()],
        ),
        Table("Verdicts", ("verdict", "number"), verdicts),
        Table(
            "Attempts",
            ("solved in", "items"),
            [(f"attempt {n}" if n else "initial chain", tries[n]) for n in sorted(tries)],
        ),
    ]
