"""Statistics of an evaluation: confidence intervals, paired tests, and summaries of the answers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from ..core.report.statistics import (  # noqa: F401 as the statistics of evaluations
    Estimate,
    McNemar,
    bootstrap_difference,
    mcnemar,
    wilson_interval,
)


@dataclass(frozen=True)
class PositionBias:
    """Distribution of the answers over the letters, and Pearson's test of it."""

    shares: dict[str, float]
    """Share of the answers that chose each letter."""
    expected: dict[str, float]
    """Share expected if each item's letters were equally likely."""
    statistic: float
    """Pearson's chi-square statistic."""
    p_value: float | None
    """p-value of the statistic; None without answers."""


@dataclass(frozen=True)
class LengthStatistics:
    """Output lengths in tokens."""

    mean: float
    median: float
    p95: float
    longest: int
    truncated_rate: float
    """Share of the outputs that reached the token limit."""


def accuracy_interval(right: Sequence[Sequence[bool]]) -> Estimate:
    """Computes the accuracy over items and runs, with a 95 % interval clustered by item.

    The accuracy is the mean of the items' means. The interval is Wilson's at the effective sample
    size n = p(1-p) / se², where se² = var(item means) / items. With one run, or when se is 0, n is
    the number of items.

    Args:
        right: [items][runs], whether the answer is correct.

    Returns:
        The accuracy and its interval.

    Raises:
        ValueError: there are no items, or items have different numbers of runs.

    Source: clustered variance: E. Miller, arXiv 2411.00640, eq. 4; effective sample size: E. Korn
        and B. Graubard, Survey Methodology 24 (1998).
    """
    means = _matrix(right).mean(axis=1)
    p = float(means.mean())
    variance = float(means.var()) / len(means)
    effective = p * (1 - p) / variance if variance > 0 else len(means)
    return Estimate(p, *wilson_interval(min(p * effective, effective), effective))


def pass_at_k(right: Sequence[Sequence[bool]], k: int) -> float:
    """Computes the mean over items of the probability that at least one of k runs is correct.

        1 - C(n-c, k) / C(n, k)    for an item with c correct answers among n runs

    This is the unbiased estimate for k runs drawn without replacement.

    Args:
        right: [items][runs], whether the answer is correct.
        k: Number of runs drawn, from 1 to n.

    Returns:
        The mean probability.

    Raises:
        ValueError: `k` is out of range, there are no items, or their numbers of runs differ.

    Source: arXiv 2107.03374, eq. 1.
    """
    matrix = _matrix(right)
    num_runs = matrix.shape[1]
    if not 1 <= k <= num_runs:
        raise ValueError(
            f"pass_at_k needs 1 <= k <= runs, got k={k} of {num_runs} runs: lower k or raise runs"
        )
    none_right = stats.hypergeom.pmf(0, num_runs, matrix.sum(axis=1).astype(int), k)
    return float(np.mean(1 - none_right))


def majority_vote(letters: Sequence[str | None]) -> str | None:
    """Finds the most frequent letter, and of several the one given first.

    Args:
        letters: [runs], the letter chosen; None, without an answer, is ignored.

    Returns:
        The letter; None when no run has an answer.
    """
    votes = Counter(letter for letter in letters if letter is not None)
    return max(votes, key=votes.__getitem__, default=None)


def position_bias(
    letters: Sequence[str | None],
    options: Sequence[Sequence[str]],
) -> PositionBias:
    """Performs Pearson's chi-square test of whether the answers prefer some letters.

    The expected counts spread each answer evenly over its item's letters. The p-value is only an
    approximation when items have different letters. Unless the options were permuted, an uneven
    distribution of the correct letters contributes to the statistic.

    Args:
        letters: [answers], the letter chosen; None, without an answer, is ignored.
        options: [answers], the letters of the answer's item.

    Returns:
        The shares of the letters and the test; both empty when nothing is answered.

    Raises:
        ValueError: a letter is not among its item's options.
    """
    counts: Counter[str] = Counter()
    expected: defaultdict[str, float] = defaultdict(float)
    for chosen, offered in zip(letters, options, strict=True):
        if chosen is None:
            continue
        if chosen not in offered:
            raise ValueError(f"position_bias: answer {chosen!r} is not among {', '.join(offered)}")
        counts[chosen] += 1
        for letter in offered:
            expected[letter] += 1 / len(offered)
    if not counts:
        return PositionBias({}, {}, 0.0, None)
    names = sorted(expected)
    test = stats.chisquare(
        [counts[letter] for letter in names], [expected[letter] for letter in names]
    )
    num = counts.total()
    return PositionBias(
        shares={letter: counts[letter] / num for letter in names},
        expected={letter: expected[letter] / num for letter in names},
        statistic=float(test.statistic),
        p_value=float(test.pvalue),
    )


def agreement_rate(letters: Sequence[Sequence[str | None]]) -> float:
    """Computes the mean over items of the share of pairs of runs that chose the same option.

    Args:
        letters: [items][runs], the letter chosen, in the item's own order of options. A missing
            answer agrees with no other.

    Returns:
        The mean share.

    Raises:
        ValueError: there are no items, or an item has fewer than two runs.
    """
    if min(map(len, letters), default=0) < 2:
        raise ValueError("agreement_rate needs at least one item, and two runs of each")
    shares = [
        np.mean([a is not None and a == b for a, b in combinations(runs, 2)]) for runs in letters
    ]
    return float(np.mean(shares))


def length_statistics(num_tokens: Sequence[int], truncated: Sequence[bool]) -> LengthStatistics:
    """Summarises the lengths of the outputs.

    Args:
        num_tokens: [outputs], tokens of each output.
        truncated: [outputs], whether the output reached the token limit.

    Returns:
        Mean, quantiles and maximum of the lengths, and the share of truncated outputs.

    Raises:
        ValueError: there are no outputs, or the two lengths differ.
    """
    if not num_tokens or len(num_tokens) != len(truncated):
        raise ValueError(
            "length_statistics needs as many lengths as flags, at least one; "
            f"got {len(num_tokens)} and {len(truncated)}"
        )
    median, p95 = np.quantile(num_tokens, (0.5, 0.95))
    return LengthStatistics(
        mean=float(np.mean(num_tokens)),
        median=float(median),
        p95=float(p95),
        longest=max(num_tokens),
        truncated_rate=float(np.mean(truncated)),
    )


def _matrix(right: Sequence[Sequence[bool]]) -> np.ndarray:
    nums = {len(runs) for runs in right}
    if len(nums) != 1 or 0 in nums:
        raise ValueError(
            "accuracy and pass@k need at least one item, and the same number of runs of each, "
            "at least one"
        )
    return np.array(right, dtype=float)
