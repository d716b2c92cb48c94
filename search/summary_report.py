"""What a command did with its items, as tables: in the terminal, in report.md and on a page."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..core.llm.client import LLMConfig
from ..core.report.html_page import write_page

Result = dict[str, Any]
NUM_EXAMPLES = 2
EXAMPLE_LENGTH = 160
MAX_REASONS = 40


class Table(NamedTuple):
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]


def write_report(folder: Path, *, title: str, tables: Iterable[Table]) -> None:
    """Prints the tables as Markdown and writes them to report.md and report.html; those without rows are left out."""
    tables = [table for table in tables if table.rows]
    text = f"# {title}\n" + "".join(
        f"\n## {table.title}\n\n{_markdown(table)}\n" for table in tables
    )
    text = text.encode("utf-8", "replace").decode()  # of half a character in a question
    (folder / "report.md").write_text(text, encoding="utf-8")
    template = Path(__file__).with_name("summary_report.html.jinja")
    write_page(folder / "report.html", template, folder=folder, title=title, tables=tables)
    print(text)


def _markdown(table: Table) -> str:
    rows = [table.columns, ("---",) * len(table.columns), *table.rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
        for row in rows
    )


def tokens_table(results: Iterable[Result], models: Sequence[LLMConfig]) -> Table:
    """What every kind of prompt took, answers that could not be used included; calls that a run shared count each time."""
    prices = {model.model: (model.price_in, model.price_out) for model in models}
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0] * 5)
    for call in (
        call for result in results for step in result["trajectory"] for call in step["calls"]
    ):
        tokens = call["prompt_tokens"], call["completion_tokens"]
        usd = sum(
            num * price / 1e6 for num, price in zip(tokens, prices[call["model"]], strict=True)
        )
        line = sums[call["prompt"], call["model"]]
        line[:] = [a + b for a, b in zip(line, (1, len(call["faults"]), *tokens, usd), strict=True)]
    rows = [(*key, *line[:4], f"{line[4]:.4f}") for key, line in sorted(sums.items())]
    columns = (
        "prompt",
        "model",
        "answers sought",
        "unusable answers",
        "prompt tokens",
        "answer tokens",
        "USD",
    )
    return Table("Tokens", columns, rows)


def reasons_table(title: str, cases: Iterable[tuple[str, str, str]]) -> Table:
    """Cases of (what happened, why, question), counted, with examples."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for what, why, question in cases:
        found[what, why[:EXAMPLE_LENGTH]].append(" ".join(question.split())[:EXAMPLE_LENGTH])
    ordered = sorted(found.items(), key=lambda case: -len(case[1]))
    rows = [
        (*key, len(questions), " / ".join(questions[:NUM_EXAMPLES]))
        for key, questions in ordered[:MAX_REASONS]
    ]
    rest = ordered[MAX_REASONS:]
    rows += (
        [
            (
                "others",
                f"{len(rest)} more reasons: see journal.jsonl",
                sum(len(case[1]) for case in rest),
                "",
            )
        ]
        if rest
        else []
    )
    return Table(title, ("what", "why", "items", "examples"), rows)


def funnel_table(steps: Sequence[str], fates: Sequence[Any]) -> Table:
    """How many go into each step and come out. fates: for each item where it left (`step`, `outcome`), None: came through."""
    left, rows = len(fates), []
    for step in steps:
        ended = Counter(fate.outcome for fate in fates if fate and fate.step == step)
        rows.append(
            (
                step,
                left,
                ended["dropped"],
                ended["failed"],
                ended["unreached"],
                left - sum(ended.values()),
            )
        )
        left -= sum(ended.values())
    assert left == sum(fate is None for fate in fates), "an item left at a step that is none"
    return Table("Funnel", ("step", "in", "dropped", "failed", "unreached", "out"), rows)


def end(results: Sequence[Result]) -> None:
    """The last word: a line for failed items; for unreached ones too, with exit status 1."""
    failed, unreached = (
        [r["reason"] for r in results if r["outcome"] == what] for what in ("failed", "unreached")
    )
    if failed:
        print(
            f"{len(failed)} of {len(results)} items failed; --retry_failed asks again. The first: {failed[0]}"
        )
    if unreached:
        raise SystemExit(
            f"verippo: {len(unreached)} of {len(results)} items were not finished: {unreached[0]}"
        )
