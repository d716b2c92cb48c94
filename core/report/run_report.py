"""Report of a training run: an HTML page made from its output folder.

The run may be finished, in progress or crashed. The layout is in run_report.html.jinja, the charts
are in charts.py.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..messages import printable
from .html_page import format_number, number, write_page
from .statistics import Interval, wilson_interval

Row = dict[str, Any]

MAX_POINTS = 400
"""Maximum number of points of a training curve; longer runs are averaged over blocks of steps."""
MAX_SAMPLES = 3
"""Maximum number of samples of each split at its first and at its last sampled step."""
MEASURES = {
    "exact_rate": "Exactly right",
    "right_rate": "Judged right",
    "score_mean": "Mean score",
    "reasoned_rate": "Reasoned",
    "unparsable_rate": "Unparsable",
    "truncated_rate": "Truncated",
    "response_length_mean": "Tokens per response",
    "turns_mean": "Turns per response",
    "accuracy": "Accuracy",
    "explained_variance": "Explained variance",
    "value_loss": "Value loss",
    "loss": "Loss (nats per token)",
    "token_accuracy": "Token accuracy",
}
"""Metric -> row of the before-and-after table; the summary names the first that have values."""


@dataclass(frozen=True)
class Stage:
    """A column of the before-and-after table."""

    name: str
    num: object
    """Number of evaluated answers; None if it is unknown."""
    measures: dict[str, Interval]


@dataclass(frozen=True)
class RateComparison:
    """The held-out rate beside that of the start or the baseline."""

    text: str
    """A sentence."""
    is_fall: bool
    """Whether the rate is, or was at some evaluation, significantly below the other one."""


class RunFolder:
    """Reads the files of a run, any of which may be missing or cut off by a crash.

    Attributes:
        problems: A line for each file with unreadable parts.
    """

    def __init__(self, folder: Path) -> None:
        """Args:
        folder: Output folder of the run.
        """
        self.folder = folder
        self.problems: list[str] = []

    def text(self, name: str) -> str:
        """Reads a text file.

        Args:
            name: Name of the file in the folder.

        Returns:
            The text, empty if the file is missing. Invalid bytes become replacement characters.
        """
        path = self.folder / name
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def json_object(self, name: str) -> Row:
        """Reads a JSON file that holds an object.

        Args:
            name: Name of the file in the folder.

        Returns:
            The object, empty if the file is missing or unreadable.
        """
        text = self.text(name)
        value = parse_object(text)
        if text and value is None:
            self.problems.append(f"{name}: not a JSON object, left out")
        return value or {}

    def rows(self, name: str) -> list[Row]:
        """Reads a JSONL file of objects that have a step; other lines are skipped and counted.

        Args:
            name: Name of the file in the folder.
        """
        found = [parse_object(line) for line in self.text(name).split("\n") if line.strip()]
        rows = [row for row in found if row and number(row.get("step")) is not None]
        if skipped := len(found) - len(rows):
            lines = "line" if skipped == 1 else "lines"
            self.problems.append(f"{name}: {skipped} unreadable {lines} skipped")
        return rows


def parse_object(text: str) -> Row | None:
    """Parses a JSON object.

    Args:
        text: JSON text.

    Returns:
        The object; None if the text is not JSON or holds another value.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def by_step(rows: Iterable[Row]) -> list[Row]:
    """Sorts the rows by step; of a step that a resumed run repeated, only the last row is kept.

    Args:
        rows: Rows in the order in which they were written.
    """
    latest = {row["step"]: row for row in rows}
    return [latest[step] for step in sorted(latest)]


def average_blocks(rows: list[Row], max_rows: int) -> tuple[list[Row], int]:
    """Averages blocks of consecutive rows.

    Args:
        rows: Rows of numbers; a mean leaves out values that are missing or not finite.
        max_rows: Maximum number of blocks.

    Returns:
        The mean of each block, and the number of rows in a block.
    """
    size = max(1, math.ceil(len(rows) / max_rows))
    means = []
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        mean = {}
        for key in dict.fromkeys(chain(*block)):
            values = [value for row in block if (value := number(row.get(key))) is not None]
            if values:
                mean[key] = sum(values) / len(values)
        means.append(mean)
    return means, size


def as_interval(key: str, cell: object, num: object) -> Interval:
    """Returns a measure with its interval.

    Args:
        key: Name of the metric.
        cell: Its value, or an object with value, low and high.
        num: Number of evaluated answers.

    Returns:
        The value with the given interval or, for a rate over `num` answers, Wilson's; the bounds
        are None otherwise.
    """
    if isinstance(cell, dict):
        return Interval(*(number(cell.get(part)) for part in Interval._fields))
    value = number(cell)
    count = number(num)
    if key.endswith(("_rate", "accuracy")) and value is not None and count and 0 <= value <= 1:
        return Interval(value, *wilson_interval(value * count, int(count)))
    return Interval(value)


def compare_stages(stages: Row, evals: list[Row]) -> list[Stage]:
    """Builds the columns of the before-and-after table.

    Args:
        stages: Contents of stages.json, whose rows are the columns if there are any.
        evals: Rows of eval.jsonl, of which the first and the last are the columns otherwise.
    """
    columns = []
    for row in stages.get("rows") or evals[:1] + evals[1:][-1:]:
        num = row.get("num")
        name = row.get("stage") or f"step {format_number(row.get('step'))}"
        measures = {key: as_interval(key, row.get(key), num) for key in MEASURES}
        columns.append(Stage(name, num, measures))
    return columns


def compare_rates(evals: list[Row]) -> list[RateComparison]:
    """Compares the last evaluation's held-out rate with those of the start and the baseline.

    Args:
        evals: Rows of eval.jsonl in the order of their steps.
    """
    comparisons = []
    last = evals[-1] if evals else {}
    for name in ("start", "baseline"):
        if number(last.get(f"{name}_right_rate")) is None:
            continue
        below = [row for row in evals if row.get(f"below_{name}")]
        is_below = bool(last.get(f"below_{name}"))
        points = [
            format_number(100 * value) if (value := number(last.get(key))) is not None else "–"
            for key in (f"{name}_change", f"{name}_change_low", f"{name}_change_high")
        ]
        text = (
            f"At step {format_number(last['step'])} the held-out rate is "
            f"{format_number(last.get('right_rate'), True)}, "
            f"{'significantly below' if is_below else 'beside'} the {name}'s "
            f"{format_number(last[f'{name}_right_rate'], True)} (change {points[0]} points, "
            f"95% interval {points[1]} to {points[2]})."
        )
        if below and not is_below:
            steps = ", ".join(format_number(row["step"]) for row in below)
            text += f" It was significantly below at step {steps}."
        comparisons.append(RateComparison(text, bool(below)))
    return comparisons


def choose_samples(samples: list[Row]) -> list[Row]:
    """Selects the first MAX_SAMPLES samples of the first and of the last step of each split.

    Args:
        samples: Rows of samples.jsonl.
    """
    groups: dict[str, dict[float, list[Row]]] = {}
    for row in samples:
        groups.setdefault(str(row.get("split")), {}).setdefault(row["step"], []).append(row)
    chosen = []
    for _, steps in sorted(groups.items()):
        for step in sorted({min(steps), max(steps)}):
            chosen += steps[step][:MAX_SAMPLES]
    return chosen


def try_report(folder: Path, *, title: str, classifier: bool = False) -> None:
    """Writes the report at the end of a run, and prints an error instead of raising it.

    Args:
        folder: Output folder of the run.
        title: Heading of the page.
        classifier: Whether the loss is that of answers instead of tokens.
    """
    try:
        write_report(folder, title=title, classifier=classifier)
    except Exception as error:  # of a full disk, or of damaged files; the run itself is done
        reason = f"{type(error).__name__}: {error}"
        print(f"verippo: the report was not written: {printable(reason)}", file=sys.stderr)


def write_report(
    folder: Path, *, title: str, output: Path | None = None, classifier: bool = False
) -> Path:
    """Writes the page of a run from the files that its folder holds so far.

    Sections whose files are missing are left out; files with unreadable parts are listed.

    Args:
        folder: Output folder of the run.
        title: Heading of the page.
        output: Path of the page; None writes report.html in the folder.
        classifier: Whether the loss is that of answers instead of tokens.

    Returns:
        Path of the page.
    """
    from .charts import draw_charts, draw_reliability  # matplotlib takes long to import

    files = RunFolder(folder)
    train = by_step(files.rows("metrics.jsonl"))
    evals = by_step(files.rows("eval.jsonl"))
    samples = files.rows("samples.jsonl")
    calibration = files.json_object("calibration.json")
    environment = files.json_object("environment.json")
    stages = files.json_object("stages.json")
    means, block_size = average_blocks(train, MAX_POINTS)
    data = {"train": means, "eval": evals}
    reliability = draw_reliability(calibration.get("curve") or [])
    kind = "answers" if classifier else "tokens"
    measures = MEASURES | ({"loss": "Loss (nats per answer)"} if classifier else {})
    expected = ("metrics.jsonl", "eval.jsonl", "samples.jsonl", "config.yaml", "environment.json")
    return write_page(
        output or folder / "report.html",
        Path(__file__).with_name("run_report.html.jinja"),
        folder=folder,
        title=title,
        problems=files.problems,
        train=train,
        metric_names=list(dict.fromkeys(chain(*train))),
        block_size=block_size,
        charts=[*draw_charts(kind, data), *draw_charts("training", data)],
        score_charts=[*draw_charts("score", data), *reliability],
        calibration=calibration,
        environment=environment,
        stages=stages,
        measures=measures,
        stages_compared=compare_stages(stages, evals),
        rates_compared=compare_rates(evals),
        samples=choose_samples(samples),
        num_samples=len(samples),
        absent=[name for name in expected if not (folder / name).is_file()],
        config=files.text("config.yaml"),
    )
