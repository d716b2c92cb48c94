"""The evaluation's table in the terminal and its page, for one model or for two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

from ..core.report.html_page import format_number, write_page
from .results import Row

MAX_SHOWN = 500
"""Wrong answers on a page; of more, so many are shown, evenly picked, which the page says."""
MAX_CHARACTERS = 8000
"""Of a shown answer; a longer one loses its middle. answers.jsonl has it whole."""
SCRIPT = """
const filters = [...document.querySelectorAll("[data-filter]")], items = [...document.querySelectorAll(".item")];
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


def print_table(results: Row) -> None:
    """One line a source, and one for all of them where there are several."""
    groups = ({"all sources": results["all"]} if len(results["sources"]) > 1 else {}) | results[
        "sources"
    ]
    several, scoring = results["config"]["runs"] > 1, results["config"]["scoring"]
    other = next(rule for rule in results["all"]["scorings"] if rule != scoring)
    votes = ["pass@k", "majority"] if several else []
    rows = [
        [
            "source",
            "items",
            scoring,
            "(95 %)",
            other,
            *votes,
            "no answer",
            "failed",
            "truncated",
            "tokens",
            "format",
        ]
    ]
    for source, group in groups.items():
        outcomes, length = group["outcomes"], group["length"] or {}
        value, low, high = (_percent(group["accuracy"][key]) for key in ("value", "low", "high"))
        votes = (
            [_percent(group["pass_at_k"][str(group["runs"])]), _percent(group["majority"]["value"])]
            if several
            else []
        )
        mean = round(length.get("mean", 0))
        counts = [
            format_number(n)
            for n in (group["num"], outcomes["no answer"], outcomes["failed"], mean)
        ]
        rows.append(
            [
                source,
                counts[0],
                value,
                f"({low} to {high})",
                _percent(group["scorings"][other]["value"]),
                *votes,
                *counts[1:3],
                _percent(length.get("truncated_rate")),
                counts[3],
                _percent(group["format_rate"]),
            ]
        )
    print(aligned(rows))
    if results["failures"]:
        print(
            f"{len(results['failures'])} answers failed for good and count as wrong: --retry_failed asks again"
        )


def aligned(rows: list[list[str]]) -> str:
    """The cells in columns: the first to the left, the others to the right."""
    blanks = [
        [max(map(_width, column)) - _width(cell) for cell in column]
        for column in zip(*rows, strict=True)
    ]
    lines = (
        [first + " " * num, *(" " * n + cell for cell, n in zip(rest, others, strict=True))]
        for (first, *rest), (num, *others) in zip(rows, zip(*blanks, strict=True), strict=True)
    )
    return "\n".join("  ".join(line) for line in lines)


def _width(text: str) -> int:
    return len(text) + sum(east_asian_width(character) in "WF" for character in text)


def _percent(x: object) -> str:
    return format_number(x, percent=True)


def write_report(output: Path, results: Row, texts: Sequence[str]) -> Path:
    """The page of one evaluation. texts: of its answers, item after item."""
    pairs = [(item, answer) for item in results["items"] for answer in item["answers"]]
    wrong = [
        {"item": item, "answer": answer, "text": _shortened(text)}
        for (item, answer), text in zip(pairs, texts, strict=True)
        if not answer["right"]
    ]
    return page(
        output,
        title=f"Evaluation of {Path(results['config']['model']).name}",
        models=[results],
        wrong=wrong,
    )


def page(
    output: Path, *, title: str, models: list[Row], wrong: list[Row], comparison: Row | None = None
) -> Path:
    """Renders eval/report.html.jinja. wrong: {item, answer, text}, or {item, answers} of a comparison."""
    num = min(len(wrong), MAX_SHOWN)
    shown = [wrong[n * len(wrong) // num] for n in range(num)]
    values: dict[str, Any] = {
        "title": title,
        "models": models,
        "comparison": comparison,
        "num_wrong": len(wrong),
        "wrong": shown,
    }
    template = Path(__file__).with_name("accuracy_report.html.jinja")
    return write_page(
        output, template, folder=output.parent, script=SCRIPT if shown else "", **values
    )


def _shortened(text: str) -> str:
    half = MAX_CHARACTERS // 2
    cut = len(text) - 2 * half
    return (
        text if cut <= 0 else f"{text[:half]}\n[... {cut} characters left out ...]\n{text[-half:]}"
    )
