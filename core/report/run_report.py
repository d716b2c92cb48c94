"""One self-contained HTML page from a stage's output folder: finished, running or crashed.

Everything is inline (SVG, CSS) and nothing runs (no script; a Content-Security-Policy forbids even images). What a run
wrote reaches the page only through Jinja's autoescape. The layout is in report.html.jinja.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from .charts import PLOTS, SCORE_PLOTS, Row, draw_plot, draw_reliability
from .html_page import format_number, number, write_page
from .statistics import Interval, wilson_interval

MAX_POINTS = 400
"""Points of a training curve: longer runs are averaged over blocks of steps, which the page says."""
MAX_SAMPLES = 3
"""Samples shown for each split, at the first and at the last sampled step."""


MEASURES = {
    "exact_rate": "Exactly right",
    "right_rate": "Judged right",
    "score_mean": "Mean score",
    "reasoned_rate": "Reasoned",
    "unparsable_rate": "Unparsable",
    "truncated_rate": "Truncated",
    "response_length_mean": "Tokens per response",
    "loss": "Loss (nats per token)",
    "token_accuracy": "Token accuracy",
}
"""Rows of the before/after table; the summary names the first of them that there are."""


def read_json(text: str) -> Row | None:
    """The JSON object in `text`, or None where it is cut off or no object."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_text(path: Path) -> str:
    """The file's text, "" without a file; bytes that a crash cut through become replacement characters."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_steps(path: Path) -> tuple[list[Row], int]:
    """The objects of a JSONL file that have a step, and how many lines are none, as a crash leaves at the end."""
    found = [read_json(line) for line in read_text(path).split("\n") if line.strip()]
    rows = [row for row in found if row and number(row.get("step")) is not None]
    return rows, len(found) - len(rows)


def by_step(rows: Iterable[Row]) -> list[Row]:
    """Rows in the order of their steps; of two with one step (a resumed run repeats some) the later written counts."""
    latest = {row["step"]: row for row in rows}
    return [latest[step] for step in sorted(latest)]


def average_blocks(rows: list[Row], max_rows: int) -> tuple[list[Row], int]:
    """At most `max_rows` rows, each the mean of `size` consecutive ones over the values there are; and `size`."""
    size = max(1, math.ceil(len(rows) / max_rows))
    means = []
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        columns = {
            key: [v for row in block if (v := number(row.get(key))) is not None]
            for key in set().union(*block)
        }
        means.append({key: sum(values) / len(values) for key, values in columns.items() if values})
    return means, size


def as_interval(key: str, cell: object, num: object) -> Interval:
    """A measure's value: with the interval it comes with, or for a rate over `num` answers Wilson's."""
    if isinstance(cell, dict):
        return Interval(*(number(cell.get(part)) for part in Interval._fields))
    value, count = number(cell), number(num)
    if key.endswith("_rate") and value is not None and count and 0 <= value <= 1:
        return Interval(value, *wilson_interval(value * count, int(count)))
    return Interval(value)


def compare_stages(stages: Row, evals: list[Row]) -> list[Row]:
    """One object a stage (name, num, measures): the rows of stages.json, else the first and the last evaluation."""
    rows = stages.get("rows") or evals[:1] + evals[1:][-1:]
    return [
        {
            "name": row.get("stage") or f"step {format_number(row.get('step'))}",
            "num": row.get("num"),
        }
        | {key: as_interval(key, row.get(key), row.get("num")) for key in MEASURES}
        for row in rows
    ]


def choose_samples(samples: list[Row]) -> list[Row]:
    """Of each split the first MAX_SAMPLES samples of its first and of its last step, in this order."""
    chosen = []
    for split in sorted({str(row.get("split")) for row in samples}):
        mine = [row for row in samples if str(row.get("split")) == split]
        for step in sorted({min(row["step"] for row in mine), max(row["step"] for row in mine)}):
            chosen += [row for row in mine if row["step"] == step][:MAX_SAMPLES]
    return chosen


def try_report(folder: Path, *, title: str) -> None:
    """At a run's end, well or not: a full disk is said, and must not hide what ended the run."""
    try:
        write_report(folder, title=title)
    except OSError as error:
        print(f"verippo: no report: {error}", file=sys.stderr)


def write_report(folder: Path, *, title: str, output: Path | None = None) -> Path:
    """Writes the page on what a stage has left in `folder` so far to `output` (folder/report.html); its path.

    Any input may be absent or cut off by a crash: its section is left out, and what was skipped is counted on the page.
    """
    problems: list[str] = []
    rows: dict[str, list[Row]] = {}
    objects: dict[str, Any] = {}
    for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl"):
        rows[name], num_skipped = read_steps(folder / name)
        if num_skipped:
            problems.append(
                f"{name}: {num_skipped} unreadable {'line' if num_skipped == 1 else 'lines'} skipped"
            )
    for name in ("calibration.json", "environment.json", "stages.json"):
        text = read_text(folder / name)
        objects[name.removesuffix(".json")] = read_json(text) or {}
        if text and read_json(text) is None:
            problems.append(f"{name}: not a JSON object, left out")
    train, evals = by_step(rows["metrics.jsonl"]), by_step(rows["eval.jsonl"])
    means, block_size = average_blocks(train, MAX_POINTS)
    data = {"train": means, "eval": evals}
    score_figures = [draw_plot(plot, data, name=f"s{i}") for i, plot in enumerate(SCORE_PLOTS)]
    score_figures.append(draw_reliability(objects["calibration"].get("curve") or [], name="r"))
    figures = [draw_plot(plot, data, name=f"f{i}") for i, plot in enumerate(PLOTS)]
    return write_page(
        output or folder / "report.html",
        Path(__file__).with_name("run_report.html.jinja"),
        folder=folder,
        title=title,
        problems=problems,
        **objects,
        train=train,
        block_size=block_size,
        score_figures=[f for f in score_figures if f],
        figures=[f for f in figures if f],
        measures=MEASURES,
        stages_compared=compare_stages(objects["stages"], evals),
        metric_names=list(dict.fromkeys(chain(*train))),
        samples=choose_samples(rows["samples.jsonl"]),
        num_samples=len(rows["samples.jsonl"]),
        absent=[
            name
            for name in (*rows, "config.yaml", "environment.json")
            if not (folder / name).is_file()
        ],
        config=read_text(folder / "config.yaml"),
    )
