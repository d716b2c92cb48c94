"""Tables of what a command did with its items: in the terminal, in report.md and on a page."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..core.llm.client import LLMConfig
from ..core.report.html_page import write_page
from .results import KEPT, ItemResult

NUM_EXAMPLES = 2
EXAMPLE_LENGTH = 160
MAX_REASONS = 40


class Table(NamedTuple):
    """A titled table."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]


class Exit(NamedTuple):
    """Where an item left the funnel."""

    step: str
    outcome: str
    """dropped, failed or unreached."""
    reason: str


def write_report(folder: Path, *, title: str, tables: Iterable[Table]) -> None:
    """Prints the tables as Markdown and writes them to report.md and report.html.

    Tables without rows are left out.
    """
    tables = [table for table in tables if table.rows]
    text = f"# {title}\n"
    text += "".join(f"\n## {table.title}\n\n{_markdown(table)}\n" for table in tables)
    text = text.encode("utf-8", "replace").decode()  # a question may hold unpaired surrogates
    (folder / "report.md").write_text(text, encoding="utf-8")
    template = Path(__file__).with_name("summary_report.html.jinja")
    write_page(folder / "report.html", template, folder=folder, title=title, tables=tables)
    print(text)


def _markdown(table: Table) -> str:
    rows = [table.columns, ("---",) * len(table.columns), *table.rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def tokens_table(results: Iterable[ItemResult], models: Sequence[LLMConfig]) -> Table:
    """Calls, tokens and cost by prompt and model, unusable replies included.

    Calls that items of equal content share count once for each item.
    """
    prices = {model.model: (model.price_in, model.price_out) for model in models}
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0] * 5)
    for call in (call for result in results for call in result.calls):
        price_in, price_out = prices[call.model]
        usd = (call.prompt_tokens * price_in + call.completion_tokens * price_out) / 1e6
        unusable = sum(not fault.endswith(KEPT) for fault in call.faults)
        numbers = (1, unusable, call.prompt_tokens, call.completion_tokens, usd)
        line = sums[call.prompt, call.model]
        line[:] = [a + b for a, b in zip(line, numbers, strict=True)]
    rows = [(*key, *line[:4], f"{line[4]:.4f}") for key, line in sorted(sums.items())]
    counted = ("answers sought", "unusable answers", "prompt tokens", "answer tokens", "USD")
    return Table("Tokens", ("prompt", "model", *counted), rows)


def faults_table(results: Iterable[ItemResult]) -> Table:
    """Counts the faults of replies by prompt and kind, the most frequent first.

    Replies that were used although something could be better count as kept.
    """
    counts = Counter(
        (call.prompt, fault.partition(":")[0], "kept" if fault.endswith(KEPT) else "asked again")
        for result in results
        for call in result.calls
        for fault in call.faults
    )
    rows = [(*case, number) for case, number in counts.most_common(MAX_REASONS)]
    return Table("Faults of replies", ("prompt", "fault", "then", "replies"), rows)


def reasons_table(title: str, cases: Iterable[tuple[str, str, str]]) -> Table:
    """Counts cases of (what happened, why, question), the most frequent first, with examples."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for what, why, question in cases:
        found[what, why[:EXAMPLE_LENGTH]].append(" ".join(question.split())[:EXAMPLE_LENGTH])
    ordered = sorted(found.items(), key=lambda case: -len(case[1]))
    rows: list[tuple[Any, ...]] = [
        (*key, len(questions), " / ".join(questions[:NUM_EXAMPLES]))
        for key, questions in ordered[:MAX_REASONS]
    ]
    if others := ordered[MAX_REASONS:]:
        why = f"{len(others)} more reasons: see journal.jsonl"
        rows.append(("others", why, sum(len(case[1]) for case in others), ""))
    return Table(title, ("what", "why", "items", "examples"), rows)


def funnel_table(steps: Sequence[str], exits: Sequence[Exit | None]) -> Table:
    """How many items enter and leave each step; `exits` holds None for items that came through."""
    remaining = len(exits)
    rows = []
    for step in steps:
        ended = Counter(item.outcome for item in exits if item and item.step == step)
        counts = (ended["dropped"], ended["failed"], ended["unreached"])
        rows.append((step, remaining, *counts, remaining - sum(counts)))
        remaining -= sum(counts)
    assert remaining == sum(item is None for item in exits), "an item left at an unknown step"
    return Table("Funnel", ("step", "in", "dropped", "failed", "unreached", "out"), rows)


def report_unfinished(results: Sequence[ItemResult]) -> None:
    """Prints a line for failed items; exits with status 1 if items were not reached."""
    failed = [result.reason for result in results if result.outcome == "failed"]
    unreached = [result.reason for result in results if result.outcome == "unreached"]
    if failed:
        print(
            f"{len(failed)} of {len(results)} items failed; --retry_failed asks again. "
            f"The first: {failed[0]}"
        )
    if unreached:
        raise SystemExit(
            f"verippo: {len(unreached)} of {len(results)} items were not finished: {unreached[0]}"
        )
