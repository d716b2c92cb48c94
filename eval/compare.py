"""`verippo eval compare A B`: compares two evaluations of the same items."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ..core.files import parse_json, read_file, replace_file
from ..core.training.checkpoint import prepare_output
from ..core.training.run import changed_settings
from .accuracy_report import percent, print_rows, render_page
from .config import CompareConfig, Scoring
from .results import AnswerRow, ItemRow, group_by
from .significance import Estimate, McNemar, accuracy_interval, bootstrap_difference, mcnemar

Pair = tuple[ItemRow, ItemRow]
"""One item as the first and as the second evaluation asked it."""


@dataclass(frozen=True)
class Difference(McNemar):
    """Comparison of two evaluations on a set of items, and McNemar's test of the majority votes."""

    num: int
    """Number of items."""
    accuracies: list[Estimate]
    """Accuracy of each evaluation, over all runs."""
    difference: Estimate
    """Accuracy of the second minus that of the first."""


@dataclass(frozen=True)
class Comparison:
    """Results that compare.json adds to the comparison's configuration."""

    shared: int
    """Number of items that both evaluations have."""
    left_out: list[int]
    """Number of items that only the first and only the second evaluation has."""
    settings: dict[str, list[Any]]
    """Settings that differ, with both values."""
    sources: dict[str, Difference]


def compare(config: CompareConfig, *, resolved: dict[str, Any]) -> Path:
    """Writes compare.json and compare.html, and prints a table.

    Args:
        config: The comparison's configuration.
        resolved: The configuration as plain values, written to compare.json.

    Returns:
        The output folder.

    Raises:
        ValueError: an evaluation cannot be read, the two share no item, or the output folder holds
            another comparison.
    """
    first_settings, first = load_results(config.first)
    second_settings, second = load_results(config.second)
    pairs = shared_items(first, second)
    if not pairs:
        raise ValueError(
            f"{config.first} and {config.second} share no item: evaluate both on the same --data"
        )
    groups = group_by(pairs, lambda pair: pair[0].source)
    if len(groups) > 1:
        groups = {"all sources": pairs, **groups}
    comparison = Comparison(
        shared=len(pairs),
        left_out=[len(first) - len(pairs), len(second) - len(pairs)],
        settings={
            name: [first_settings.get(name), value]
            for name, value in second_settings.items()
            if value != first_settings.get(name)
        },
        sources={
            source: differences(group, config.scoring, config.seed)
            for source, group in groups.items()
        },
    )
    folder = prepare_output(config.output, resume="auto")
    _check_output(folder, resolved)
    record = {**resolved, **vars(comparison)}
    text = json.dumps(record, ensure_ascii=False, indent=1, default=vars)
    replace_file(folder / "compare.json", text)
    page = render_page(
        folder / "compare.html",
        _differing(pairs, config.scoring),
        title="Two evaluations",
        models=[first_settings, second_settings],
        comparison=record,
    )
    print_comparison(config, comparison)
    print(f"report: {page}")
    return folder


def _check_output(folder: Path, resolved: dict[str, Any]) -> None:
    """Refuses to replace the comparison of other evaluations, or with other settings."""
    file = folder / "compare.json"
    if not file.exists():
        return
    try:
        before = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{file}: not a comparison: choose another --output") from None
    if changed := changed_settings(["first", "second", "scoring", "seed"], before, resolved):
        raise ValueError(
            f"output {folder}: holds another comparison ({', '.join(changed)}): "
            "choose another --output"
        )


def load_results(path: str) -> tuple[dict[str, Any], list[ItemRow]]:
    """Reads the settings and the items of an evaluation.

    Args:
        path: Output folder of the evaluation, or its results.json.

    Returns:
        Setting -> value, and the scored items.

    Raises:
        ValueError: the file is missing or is not the results of an evaluation.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file /= "results.json"
    try:
        data = read_file(file, name="results")
    except ValueError as error:
        raise ValueError(f"{error}: give the output folder of `verippo eval`") from None
    try:
        results = parse_json(data, where=str(file))
        items = [_item_row(item) for item in results["items"]]
        if len({len(item.answers) for item in items}) != 1:
            raise ValueError("no items, or different numbers of answers")
        return dict(results["config"]), items
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{file}: not the results.json of `verippo eval`") from None


def _item_row(item: dict[str, Any]) -> ItemRow:
    """An item as `verippo eval` wrote it; an error of any kind for another."""
    answers = [AnswerRow(**answer) for answer in item["answers"]]
    fields: dict[str, Any] = {**item, "answers": answers}
    row = ItemRow(**fields)
    letters = [answer.letters for answer in answers]
    if not isinstance(row.options, dict) or not isinstance(row.source, str):
        raise TypeError("options or source")
    if not answers or any(set(each) != set(get_args(Scoring)) for each in letters):
        raise TypeError("answers")
    return row


def shared_items(first: list[ItemRow], second: list[ItemRow]) -> list[Pair]:
    """Pairs the items of equal source, question, options and answer, in the first's order."""

    def content(item: ItemRow) -> str:  # without the id, which may be the position in the file
        return json.dumps([item.source, item.question, item.options, item.gold])

    others = group_by(second, content)
    return [(item, others[content(item)].pop(0)) for item in first if others.get(content(item))]


def differences(pairs: list[Pair], scoring: Scoring, seed: int) -> Difference:
    """Compares the two evaluations on these items.

    Args:
        pairs: The items, as each evaluation asked them.
        scoring: Scoring that decides which answers are right.
        seed: Seed of the bootstrap.
    """
    sides = list(zip(*pairs, strict=True))
    first, second = ([item.right(scoring) for item in side] for side in sides)
    votes = [[item.majority_right(scoring) for item in side] for side in sides]
    return Difference(
        **vars(mcnemar(*votes)),
        num=len(pairs),
        accuracies=[accuracy_interval(first), accuracy_interval(second)],
        difference=bootstrap_difference(np.mean(second, 1), np.mean(first, 1), seed=seed),
    )


def _differing(pairs: list[Pair], scoring: Scoring) -> list[dict[str, Any]]:
    """Template values of the items that only one evaluation has right."""
    rows = []
    for pair in pairs:
        first_right, second_right = (item.majority_right(scoring) for item in pair)
        if first_right != second_right:
            letters = ["".join(x or "–" for x in item.letters(scoring)) for item in pair]
            outcome = f"only {'first' if first_right else 'second'} right"
            rows.append({"item": pair[0], "letters": letters, "outcome": outcome})
    return rows


def print_comparison(config: CompareConfig, comparison: Comparison) -> None:
    """Prints both accuracies, their difference in percentage points and the test of each source.

    Args:
        config: The comparison's configuration.
        comparison: Its results.
    """
    for path, num in zip((config.first, config.second), comparison.left_out, strict=True):
        if num:
            print(
                f"left out: {num} items of {path} that the other does not have "
                f"({comparison.shared} are shared)"
            )
    rows = []
    for source, row in comparison.sources.items():
        first, second = row.accuracies
        value, low, high = (f"{100 * bound:+.1f}" for bound in vars(row.difference).values())
        rows.append(
            {
                "source": source,
                "items": row.num,
                "first": percent(first.value),
                "second": percent(second.value),
                "difference": value,
                "(95 %)": f"({low} to {high})",
                "only first": row.only_first,
                "only second": row.only_second,
                "McNemar p": row.p_value,
            }
        )
    print_rows(rows)
