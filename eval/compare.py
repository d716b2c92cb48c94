"""`verippo eval compare A B`: two evaluations of the same items, item by item."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core.report.html_page import format_number
from ..core.training.checkpoint import prepare_output
from .accuracy_report import aligned, page
from .config import CompareConfig, Scoring
from .results import Row, right_by_majority, right_runs
from .significance import accuracy_interval, bootstrap_difference, mcnemar

Pair = tuple[Row, Row]


def compare(config: CompareConfig, *, resolved: dict[str, Any]) -> Path:
    """Writes compare.json and compare.html and prints the table; the folder. Raises ValueError when nothing is shared."""
    first, second = load_results(config.first), load_results(config.second)
    scoring = config.scoring
    pairs, left_out = shared_items(first, second)
    if not pairs:
        raise ValueError(
            f"{config.first} and {config.second} share no item: evaluate both on the same --data"
        )
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair[0]["source"], []).append(pair)
    table = {source: differences(group, scoring, config.seed) for source, group in groups.items()}
    if len(groups) > 1:
        table = {"all sources": differences(pairs, scoring, config.seed), **table}
    settings = {
        key: [first["config"].get(key), value]
        for key, value in second["config"].items()
        if value != first["config"].get(key)
    }
    comparison = {
        **resolved,
        "shared": len(pairs),
        "left_out": left_out,
        "settings": settings,
        "sources": table,
    }
    folder = prepare_output(config.output, resume="auto")
    (folder / "compare.json").write_text(
        json.dumps(comparison, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    differing = [
        {"item": pair[0], "letters": _letters(pair, scoring), "outcome": outcome}
        for pair in pairs
        if (outcome := _outcome(pair, scoring))
    ]
    page(
        folder / "compare.html",
        title="Two evaluations",
        models=[first, second],
        wrong=differing,
        comparison=comparison,
    )
    print_comparison(comparison)
    print(f"report: {folder / 'compare.html'}")
    return folder


def load_results(path: str) -> Row:
    """results.json of an output folder, or the file itself. Raises ValueError when it is none."""
    file = Path(path).expanduser()
    file = file / "results.json" if file.is_dir() else file
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        results["items"][0]["answers"], results["config"]["scoring"]
    except OSError as error:
        raise ValueError(
            f"{file}: {error.strerror}: give the output folder of `verippo eval`"
        ) from None
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{file}: not the results.json of `verippo eval`") from None
    return results


def shared_items(first: Row, second: Row) -> tuple[list[Pair], list[int]]:
    """The items that both have, with equal source, question, options and answer, and how many each has besides."""

    def content(item: Row) -> str:  # not the id, which may be an item's place in its file
        return json.dumps([item[key] for key in ("source", "question", "options", "gold")])

    others: dict[str, list[Row]] = {}
    for item in second["items"]:
        others.setdefault(content(item), []).append(item)
    pairs = [
        (item, others[content(item)].pop(0)) for item in first["items"] if others.get(content(item))
    ]
    return pairs, [len(results["items"]) - len(pairs) for results in (first, second)]


def differences(pairs: list[Pair], scoring: Scoring, seed: int) -> Row:
    """Accuracies over the runs, their difference (second less first) with its interval, and McNemar's test of the
    majority votes."""
    runs = [[right_runs(pair[side], scoring) for pair in pairs] for side in (0, 1)]
    means = [[sum(right) / len(right) for right in side] for side in runs]
    votes = [[right_by_majority(pair[side], scoring) for pair in pairs] for side in (0, 1)]
    return {
        "num": len(pairs),
        "accuracies": [accuracy_interval(side)._asdict() for side in runs],
        "difference": bootstrap_difference(means[1], means[0], seed=seed)._asdict(),
        **mcnemar(votes[0], votes[1])._asdict(),
    }


def _outcome(pair: Pair, scoring: Scoring) -> str | None:
    first, second = (right_by_majority(item, scoring) for item in pair)
    return None if first == second else "only first right" if first else "only second right"


def _letters(pair: Pair, scoring: Scoring) -> list[str]:
    return [
        "".join(a["letters"][scoring] or "–" for a in item["answers"] if not a["permutation"])
        for item in pair
    ]


def print_comparison(comparison: Row) -> None:
    """One line a source: both accuracies, the difference in points, and the test."""
    for name, num in zip(("first", "second"), comparison["left_out"], strict=True):
        if num:
            print(
                f"left out: {num} items of {comparison[name]} that the other has not ({comparison['shared']} are shared)"
            )
    rows = [
        [
            "source",
            "items",
            "first",
            "second",
            "difference",
            "(95 %)",
            "only first",
            "only second",
            "McNemar p",
        ]
    ]
    for source, row in comparison["sources"].items():
        num, *tested = (
            format_number(row[key]) for key in ("num", "only_first", "only_second", "p_value")
        )
        accuracies = [format_number(cell["value"], percent=True) for cell in row["accuracies"]]
        value, low, high = (
            f"{100 * row['difference'][key]:+.1f}" for key in ("value", "low", "high")
        )
        rows.append([source, num, *accuracies, value, f"({low} to {high})", *tested])
    print(aligned(rows))
