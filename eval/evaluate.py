"""`verippo eval`: asks every item, scores the answers, and writes the numbers and the page."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ..core.llm.journal import Journal
from ..core.training.checkpoint import prepare_output
from .accuracy_report import print_table, write_report
from .answering import Answer, Case, ask, check_weights, make_cases
from .config import EvalConfig
from .questions import load_questions
from .results import Row, by_source, item_rows, summarise
from .score import extract_choice


def evaluate(config: EvalConfig, *, resolved: dict[str, Any]) -> Path:
    """Runs the evaluation, or goes on with it, and returns the output folder. Raises ValueError for the caller's mistakes."""
    folder = prepare_output(config.output, resume="auto")
    if config.resume == "never" and (folder / "journal.jsonl").exists():
        raise ValueError(
            f"output {folder}: holds an evaluation already: choose another, or --resume auto to go on with it"
        )
    questions, malformed = load_questions(config.data, limit=config.limit)
    for line in malformed:
        print(f"{'skipped' if config.skip_bad else 'malformed'}: {line}", file=sys.stderr)
    if malformed and not config.skip_bad:
        total = len(malformed) + len(questions)
        raise ValueError(
            f"{config.data}: {len(malformed)} malformed of {total} items: mend them, or give --skip_bad true"
        )
    cases = make_cases(
        questions, runs=config.runs, permutations=config.permutations, seed=config.seed
    )
    started = time.monotonic()
    with Journal(folder / "journal.jsonl") as journal, Progress(len(cases)) as progress:
        check_weights(journal, config.model)
        _write(
            folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
        )
        answers = ask(config, cases, journal, progress.update)
    items = item_rows(questions, cases, answers, config.scoring)
    results = summary(config, items, malformed) | {"seconds": round(time.monotonic() - started, 1)}
    write_answers(folder / "answers.jsonl", cases, answers)
    _write(folder / "results.json", json.dumps(results, ensure_ascii=False, allow_nan=False))
    write_report(folder / "report.html", results, [answer.text for answer in answers])
    print_table(results)
    print(f"report: {folder / 'report.html'}")
    return folder


def summary(config: EvalConfig, items: list[Row], malformed: list[str]) -> Row:
    """What results.json holds."""
    facts = (
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
    )
    failures = [
        {
            "source": item["source"],
            "id": item["id"],
            "file": item["file"],
            "index": item["index"],
            "run": answer["run"],
            "permutation": answer["permutation"],
            "error": answer["error"],
        }
        for item in items
        for answer in item["answers"]
        if answer["error"]
    ]
    return {
        "config": {name: getattr(config, name) for name in facts}
        | {"model": config.client.model, "top_p": config.nucleus},
        "sources": {
            source: summarise(rows, config.scoring) for source, rows in by_source(items).items()
        },
        "all": summarise(items, config.scoring),
        "malformed": malformed,
        "failures": failures,
        "items": items,
    }


class Progress:
    """A bar with the accuracy so far. Failed answers are named as they come."""

    def __init__(self, total: int) -> None:
        self.right = 0
        self.bar = tqdm(
            total=total,
            desc="eval",
            unit="answer",
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        )

    def update(self, case: Case, answer: Answer) -> None:
        """Takes in one answer."""
        if not self.bar.n:
            self.bar.unpause()  # loading a model or starting a server tells nothing of the answers' pace
        self.right += extract_choice(answer.text, case.question.options) == case.question.answer_idx
        if answer.error:
            question = case.question
            tqdm.write(
                f"failed: {question.file}: {question.source} item {question.index}: {answer.error}",
                file=sys.stderr,
            )
        self.bar.set_postfix(accuracy=f"{self.right / (self.bar.n + 1):.3f}", refresh=False)
        self.bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def write_answers(path: Path, cases: Sequence[Case], answers: Sequence[Answer]) -> None:
    """One line an answer, with its whole text."""
    lines = [
        json.dumps(
            {
                "source": case.question.source,
                "id": case.question.id,
                "run": case.run,
                "permutation": case.permutation,
                "seed": case.seed,
                **answer._asdict(),
            },
            ensure_ascii=False,
        )
        for case, answer in zip(cases, answers, strict=True)
    ]
    _write(path, "\n".join(lines) + "\n")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    temporary.replace(path)
