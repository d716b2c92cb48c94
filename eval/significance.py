"""How sure a score is, and how two scores compare. Pure; numpy only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from ..core.report.statistics import Interval, wilson_interval


class McNemar(NamedTuple):
    """Items that only the first or only the second model has right, and the exact two-sided p-value."""

    only_first: int
    only_second: int
    p_value: float


class PositionBias(NamedTuple):
    """Answers by letter against an even choice among each item's options. `statistic` is chi-square."""

    shares: dict[str, float]
    expected: dict[str, float]
    statistic: float
    p_value: float


class LengthStatistics(NamedTuple):
    """Tokens per output, and the share of outputs that the token limit cut."""

    mean: float
    median: float
    p95: float
    longest: int
    truncated_rate: float


def accuracy_interval(right: Sequence[Sequence[bool]]) -> Interval:
    """Accuracy of [items][runs] with its 95 % interval; runs of one item are not counted as independent.

    Mean of the items' means; Wilson's interval at the effective number of answers n = p(1-p) / se², where se² is the
    clustered variance var(item means) / items (E. Miller, arXiv 2411.00640, eq. 4; effective size: Korn and Graubard,
    Survey Methodology 24 (1998)). With one run that is Wilson's interval of the items, as it is when se is 0.
    Raises ValueError without items, or when items have different numbers of runs.
    """
    means = _matrix(right).mean(axis=1)
    p, variance = float(means.mean()), float(means.var()) / len(means)
    effective = p * (1 - p) / variance if variance > 0 else len(means)
    return Interval(p, *wilson_interval(min(p * effective, effective), effective))


def pass_at_k(right: Sequence[Sequence[bool]], k: int) -> float:
    """Mean over items of the chance that k of an item's n runs, drawn without replacement, hold a right one.

    1 - C(n-c, k) / C(n, k) for c right of n, unbiased: arXiv 2107.03374, eq. 1. Raises ValueError unless 1 <= k <= n.
    """
    matrix = _matrix(right)
    n = matrix.shape[1]
    if not 1 <= k <= n:
        raise ValueError(
            f"pass_at_k needs 1 <= k <= runs, got k={k} of {n} runs: lower k or raise runs"
        )
    return float(
        np.mean([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in matrix.sum(axis=1)])
    )


def majority_vote(letters: Sequence[str | None]) -> str | None:
    """The letter that most runs gave; of equals the one given first. Runs without an answer do not vote; None if none did."""
    votes = Counter(letter for letter in letters if letter is not None)
    return max(votes, key=lambda letter: votes[letter]) if votes else None


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Exact McNemar test of two models on the same items: b of the b+c items with one right model is Binomial(b+c, 1/2).

    Two-sided: twice the smaller tail, at most 1; 1 when the models never differ. Q. McNemar, Psychometrika 12 (1947).
    Raises ValueError when the two have different numbers of items.
    """
    pairs = Counter(zip(map(bool, first), map(bool, second), strict=True))
    b, c = pairs[True, False], pairs[False, True]
    whole = math.lgamma(b + c + 1) - (b + c - 1) * math.log(2)  # log of 2 (b+c)! / 2^(b+c)
    tails = math.fsum(
        math.exp(whole - math.lgamma(i + 1) - math.lgamma(b + c - i + 1))
        for i in range(min(b, c) + 1)
    )
    return McNemar(b, c, min(1.0, tails))


def bootstrap_difference(
    first: Sequence[float], second: Sequence[float], *, seed: int, num_draws: int = 10_000
) -> Interval:
    """Difference of accuracy, first - second, on the same items, with its 95 % percentile interval over resampled items.

    Values are right or not, or an item's mean over runs. B. Efron, Annals of Statistics 7 (1979). Items with equal
    differences are alike, so a resample is a multinomial draw of how often each difference comes. Raises ValueError
    without items, or when the two have different numbers of them.
    """
    differences = np.array([float(a) - float(b) for a, b in zip(first, second, strict=True)])
    if not len(differences):
        raise ValueError("bootstrap_difference needs at least one item")
    values, counts = np.unique(differences, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(
        len(differences), counts / len(differences), size=num_draws
    )
    low, high = np.quantile(draws @ values / len(differences), (0.025, 0.975))
    return Interval(float(differences.mean()), float(low), float(high))


def position_bias(letters: Sequence[str | None], options: Sequence[Sequence[str]]) -> PositionBias:
    """Whether answers favour a letter: Pearson's chi-square of the answers given against an even choice among each item's
    letters; runs without an answer are left out. The labels' own imbalance shows too, unless options were permuted.

    The p-value holds when all items have the same letters; else it is approximate. NaN without answers.
    Raises ValueError when an answer is not among its item's letters.
    """
    counts: Counter[str] = Counter()
    expected: Counter[str] = Counter()
    for letter, among in zip(letters, options, strict=True):
        if letter is None:
            continue
        if letter not in among:
            raise ValueError(f"position_bias: answer {letter!r} is not among {', '.join(among)}")
        counts[letter] += 1
        for each in among:
            expected[each] += 1 / len(among)  # type: ignore[assignment]
    num = counts.total() or math.nan
    statistic = sum((counts[letter] - mean) ** 2 / mean for letter, mean in expected.items())
    p_value = chi_square_p_value(statistic, len(expected) - 1) if expected else math.nan
    shares, even = (
        {letter: part[letter] / num for letter in sorted(expected)} for part in (counts, expected)
    )
    return PositionBias(shares, even, float(statistic), p_value)


def chi_square_p_value(statistic: float, degrees: int) -> float:
    """P(chi-square with `degrees` of freedom >= statistic) = Q(degrees/2, statistic/2), the regularised upper gamma.

    By Q(1, x) = exp(-x), Q(1/2, x) = erfc(√x) and Q(a+1, x) = Q(a, x) + x^a exp(-x) / Γ(a+1): Abramowitz and Stegun,
    26.4.4, 26.4.5 and 6.5.21. Raises ValueError unless degrees >= 1 and statistic >= 0.
    """
    if degrees < 1 or not statistic >= 0:
        raise ValueError(
            f"chi_square_p_value needs degrees >= 1 and statistic >= 0, got {degrees} and {statistic}"
        )
    x, a = statistic / 2, 0.5 if degrees % 2 else 1.0
    if x == 0:
        return 1.0
    q = math.erfc(math.sqrt(x)) if degrees % 2 else math.exp(-x)
    while a < degrees / 2:
        q += math.exp(a * math.log(x) - x - math.lgamma(a + 1))
        a += 1
    return min(q, 1.0)


def agreement_rate(letters: Sequence[Sequence[str | None]]) -> float:
    """Mean over items of the share of pairs of its runs that chose one option: [items][runs] letters, mapped back to the
    item's own order. No answer agrees with nothing. Raises ValueError without items, or with fewer than two runs of one."""
    if not letters or any(len(runs) < 2 for runs in letters):
        raise ValueError("agreement_rate needs at least one item, and two runs of each")
    return float(
        np.mean(
            [
                np.mean([a is not None and a == b for a, b in combinations(runs, 2)])
                for runs in letters
            ]
        )
    )


def length_statistics(num_tokens: Sequence[int], truncated: Sequence[bool]) -> LengthStatistics:
    """Of the outputs' lengths in tokens. Raises ValueError without outputs."""
    if not num_tokens or len(num_tokens) != len(truncated):
        raise ValueError(
            f"length_statistics needs as many lengths as flags, got {len(num_tokens)} and {len(truncated)}"
        )
    median, p95 = np.quantile(num_tokens, (0.5, 0.95))
    return LengthStatistics(
        float(np.mean(num_tokens)),
        float(median),
        float(p95),
        max(num_tokens),
        float(np.mean(truncated)),
    )


def _matrix(right: Sequence[Sequence[bool]]) -> np.ndarray:
    if not len(right) or not len(right[0]) or any(len(runs) != len(right[0]) for runs in right):
        raise ValueError(
            "needs at least one item, and the same number of runs, at least one, of each"
        )
    return np.array(right, dtype=float)
