"""Reports of one evaluation or of two compared: a table in the terminal and an HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.utils import disp_len

from ..core.report.html_page import format_number, write_page
from .results import EvaluationResults, Summary

MAX_SHOWN = 500
"""Maximum number of answers on a page; of more, an evenly spaced selection is shown."""
percent = partial(format_number, percent=True)
"""Formats a share as a percentage."""
SCRIPT = """
const filters = [...document.querySelectorAll("[data-filter]")];
const items = [...document.querySelectorAll(".item")];
function show() {
  const fits = (item, filter) => filter.dataset.filter === "text"
    ? item.textContent.toLowerCase().includes(filter.value.toLowerCase())
    : item.dataset[filter.dataset.filter] === filter.value;
  let shown = 0;
  for (const item of items) {
    item.hidden = !filters.every(filter => !filter.value || fits(item, filter));
    shown += !item.hidden;
  }
  document.getElementById("count").textContent = `${shown} of ${items.length}`;
}
filters.forEach(filter => filter.addEventListener("input", show));
document.getElementById("filters").hidden = false;
show();
"""


def print_table(results: EvaluationResults) -> None:
    """Prints a row for each source, a row for all sources if there are several, and the failures.

    Args:
        results: Results of the evaluation.
    """
    groups = results.sources
    if len(groups) > 1:
        groups = {"all sources": results.all, **groups}
    scoring = results.config["scoring"]
    print_rows([_table_row(source, group, scoring) for source, group in groups.items()])
    if results.failures:
        print(
            f"{len(results.failures)} answers failed for good and count as wrong: "
            "use --retry_failed to ask again"
        )


def _table_row(source: str, group: Summary, scoring: str) -> dict[str, object]:
    accuracy = group.accuracy
    (other,) = group.scorings.keys() - {scoring}
    votes = {
        "pass@k": percent(group.pass_at_k[str(group.runs)]),
        "majority": percent(group.majority.value),
    }
    length = group.length
    return {
        "source": source,
        "items": group.num,
        scoring: percent(accuracy.value),
        "(95 %)": f"({percent(accuracy.low)} to {percent(accuracy.high)})",
        other: percent(group.scorings[other].value),
        **(votes if group.runs > 1 else {}),
        "no answer": group.outcomes["no answer"],
        "failed": group.outcomes["failed"],
        "truncated": percent(length and length.truncated_rate),
        "tokens": round(length.mean) if length else 0,
        "format": percent(group.format_rate),
    }


def print_rows(rows: Sequence[Mapping[str, object]]) -> None:
    """Prints a table with the rows' keys as its head.

    Args:
        rows: Rows with equal keys; texts are printed as they are, numbers are formatted. The first
            column is aligned left, the others right.
    """
    table = [list(rows[0])]
    for row in rows:
        table.append([x if isinstance(x, str) else format_number(x) for x in row.values()])
    # Chinese characters take two columns of a terminal
    widths = [max(map(disp_len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        padding = [" " * (width - disp_len(x)) for width, x in zip(widths, cells, strict=True)]
        numbers = [pad + cell for pad, cell in zip(padding[1:], cells[1:], strict=True)]
        print(cells[0] + padding[0], *numbers, sep="  ")


def write_report(output: Path, results: EvaluationResults, texts: Sequence[str]) -> Path:
    """Writes the page of one evaluation.

    Args:
        output: Path of the page.
        results: Results of the evaluation.
        texts: Text of every answer, item by item.

    Returns:
        `output`.
    """
    answers = [(item, answer) for item in results.items for answer in item.answers]
    wrong = [
        {"item": item, "answer": answer, "text": text}
        for (item, answer), text in zip(answers, texts, strict=True)
        if not answer.right
    ]
    title = f"Evaluation of {Path(results.config['model']).name}"
    return render_page(output, wrong, title=title, results=results, models=[results.config])


def render_page(
    output: Path,
    wrong: list[dict[str, Any]],
    **values: Any,
) -> Path:
    """Renders accuracy_report.html.jinja.

    Args:
        output: Path of the page.
        wrong: Template values of each wrong answer, or of each item that only one of two models
            answers correctly.
        **values: Other values of the template.

    Returns:
        `output`.
    """
    num = min(len(wrong), MAX_SHOWN)
    shown = [wrong[n * len(wrong) // num] for n in range(num)]
    return write_page(
        output,
        Path(__file__).with_name("accuracy_report.html.jinja"),
        folder=output.parent,
        script=SCRIPT if shown else "",
        num_wrong=len(wrong),
        wrong=shown,
        **values,
    )
