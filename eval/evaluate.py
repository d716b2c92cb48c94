"""`verippo eval`: asks every item, scores the answers, and writes the results and the report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ..core.files import replace_file
from ..core.llm.journal import Journal
from ..core.messages import printable
from ..core.training.checkpoint import prepare_output
from ..core.training.run import changed_settings
from .accuracy_report import print_table, write_report
from .answering import ask, check_weights
from .asked_questions import Answer, AskedQuestion, OnAnswer, list_questions_to_ask
from .config import EvalConfig
from .questions import Question, load_questions
from .results import item_rows, summarise_evaluation
from .score import extract_choice


def evaluate(config: EvalConfig, *, resolved: dict[str, Any]) -> Path:
    """Runs or resumes an evaluation, prints a table, and writes the results and the report.

    Args:
        config: The evaluation's configuration.
        resolved: The configuration as plain values, written to config.yaml.

    Returns:
        The output folder.

    Raises:
        ValueError: the data, the model, the server or the output folder cannot be used,
            or the folder holds an evaluation with other settings.
    """
    questions, malformed = _load(config)
    folder = prepare_output(config.output, resume="auto")
    if config.resume == "never" and (folder / "journal.jsonl").exists():
        raise ValueError(
            f"output {folder}: holds an evaluation already: choose another folder, "
            "or resume it with --resume auto"
        )
    asked = list_questions_to_ask(
        questions, runs=config.runs, permutations=config.permutations, seed=config.seed
    )
    started = time.monotonic()
    interval = 0.5 if sys.stderr.isatty() else 30.0
    with (
        Journal(folder / "journal.jsonl") as journal,
        tqdm(
            total=len(asked),
            desc="eval",
            unit="answer",
            mininterval=interval,
        ) as bar,
    ):
        _check_settings(config, folder, journal, resolved)

        def begin() -> None:
            check_weights(journal, config.model)
            settings = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
            replace_file(folder / "config.yaml", settings)

        answers = ask(config, asked, journal, _progress(bar), begin)
    items = item_rows(questions, asked, answers, config.scoring)
    seconds = round(time.monotonic() - started, 1)
    results = summarise_evaluation(config, items, malformed, seconds=seconds)
    write_answers(folder / "answers.jsonl", asked, answers)
    text = json.dumps(results, ensure_ascii=False, allow_nan=False, default=vars)
    replace_file(folder / "results.json", text)
    page = write_report(folder / "report.html", results, [answer.text for answer in answers])
    print_table(results)
    print(f"report: {page}")
    return folder


def _check_settings(
    config: EvalConfig, folder: Path, journal: Journal, resolved: dict[str, Any]
) -> None:
    """Refuses to replace the answers of an evaluation with other settings."""
    settings = folder / "config.yaml"
    # an evaluation that got no answer may start again with other settings
    has_answers = any(isinstance(journal.get(key), dict) for key in journal)
    if has_answers and settings.exists():
        before = yaml.safe_load(settings.read_text(encoding="utf-8"))
        now = resolved | {"llm.model": config.llm.model}
        before["llm.model"] = before["llm"]["model"]
        if changed := changed_settings(config.fixed(before), before, now):
            raise ValueError(
                f"output {folder}: holds an evaluation with other settings "
                f"({', '.join(changed)}): choose another --output, or set them back"
            )


def _load(config: EvalConfig) -> tuple[list[Question], list[str]]:
    questions, malformed = load_questions(config.data, limit=config.limit)
    for line in malformed:
        kind = "skipped" if config.skip_bad else "malformed"
        print(f"{kind}: {printable(line)}", file=sys.stderr)
    if malformed and not config.skip_bad:
        total = len(malformed) + len(questions)
        raise ValueError(
            f"{config.data}: {len(malformed)} malformed of {total} items, the first: "
            f"{malformed[0]}: correct them, or leave them out with --skip_bad true"
        )
    return questions, malformed


def _progress(bar: tqdm[Any]) -> OnAnswer:
    """Returns a callback that shows the accuracy so far and prints failed answers."""
    num_right = 0

    def update(asked: AskedQuestion, answer: Answer) -> None:
        nonlocal num_right
        if not bar.n:
            bar.unpause()  # leaves the time to load a model or start a server out of the estimate
        question = asked.question
        num_right += extract_choice(answer.text, question.options) == question.gold
        if answer.error:
            tqdm.write(f"failed: {printable(f'{question.where}: {answer.error}')}", file=sys.stderr)
        bar.set_postfix(accuracy=f"{num_right / (bar.n + 1):.3f}", refresh=False)
        bar.update()

    return update


def write_answers(
    path: Path,
    asked: Sequence[AskedQuestion],
    answers: Sequence[Answer],
) -> None:
    """Writes one JSON line for each answer, with its whole text.

    Args:
        path: Path of the JSONL file.
        asked: The questions as asked.
        answers: The answer to each question.
    """
    lines = []
    for item, answer in zip(asked, answers, strict=True):
        record = {
            "source": item.question.source,
            "id": item.question.id,
            "run": item.run,
            "permutation": item.permutation,
            "seed": item.seed,
            **vars(answer),
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    replace_file(path, "".join(lines))
