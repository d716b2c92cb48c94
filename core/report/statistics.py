"""Confidence intervals and paired tests that reports, training runs and evaluations share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

Z_95 = float(stats.norm.ppf(0.975))
"""Quantile of the standard normal distribution that bounds a two-sided 95 % interval."""


NUM_RESAMPLES = 10_000
"""Number of resamples of a bootstrap."""


class Interval(NamedTuple):
    """A value and the bounds of its 95 % interval, each None where it is unknown."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, all None when nothing was measured."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class McNemar:
    """Result of McNemar's exact test."""

    only_first: int
    """Number of items that only the first model answered correctly."""
    only_second: int
    """Number of items that only the second model answered correctly."""
    p_value: float
    """Exact two-sided p-value."""


def wilson_interval(successes: float, num: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion.

        (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n),    p = successes / n, z = 1.96

    It stays inside [0, 1] and has a positive width even at 0 or `num` successes. The closed form is
    used because `scipy.stats.binomtest` accepts whole counts only.

    Args:
        successes: Number of successes; may be fractional.
        num: Number of trials n; may be fractional, such as an effective sample size.

    Returns:
        Lower and upper bound.

    Raises:
        ValueError: `num` is not positive, or `successes` lies outside [0, num].

    Source: E. B. Wilson, JASA 22 (1927), p. 209-212.
    """
    if not 0 <= successes <= num or num <= 0:
        raise ValueError(
            f"wilson_interval needs 0 <= successes <= num and num > 0, got {successes} of {num}"
        )
    p = successes / num
    z2 = Z_95 * Z_95 / num
    centre = p + z2 / 2
    half = Z_95 * math.sqrt(p * (1 - p) / num + z2 / (4 * num))
    return max(0.0, (centre - half) / (1 + z2)), min(1.0, (centre + half) / (1 + z2))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Performs McNemar's exact test of two models on the same items.

    Under the null hypothesis, the number of items that only the first model answers correctly is
    Binomial(b + c, 1/2), where b + c items are answered correctly by exactly one of the models. The
    p-value is two-sided, and 1 when b + c is 0.

    Args:
        first: [items], whether the first model's answer is correct.
        second: [items], the same for the second model.

    Returns:
        The numbers of items that only one model answers correctly, and the p-value.

    Raises:
        ValueError: the numbers of items differ.

    Source: Q. McNemar, Psychometrika 12 (1947).
    """
    pairs = Counter(zip(first, second, strict=True))
    only_first = pairs[True, False]
    only_second = pairs[False, True]
    num = only_first + only_second
    p_value = float(stats.binomtest(only_first, num).pvalue) if num else 1.0
    return McNemar(only_first, only_second, p_value)


def bootstrap_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    seed: int,
) -> Estimate:
    """Estimates the mean of first - second over the same items by the percentile bootstrap.

    Items with equal differences are interchangeable, so a resample is one multinomial draw of how
    often each distinct difference occurs; `scipy.stats.bootstrap` would draw every item.

    Args:
        first: [items], whether the answer is correct, or its mean over runs.
        second: [items], the same for the other model.
        seed: Seed of the resampling.

    Returns:
        The mean difference and its 95 % interval.

    Raises:
        ValueError: there are no items, or the numbers of items differ.

    Source: B. Efron, Annals of Statistics 7 (1979).
    """
    differences = np.array([a - b for a, b in zip(first, second, strict=True)])
    if not len(differences):
        raise ValueError("bootstrap_difference needs at least one item")
    values, counts = np.unique(differences, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(
        len(differences), counts / len(differences), size=NUM_RESAMPLES
    )
    low, high = np.quantile(draws @ values / len(differences), (0.025, 0.975))
    return Estimate(float(differences.mean()), float(low), float(high))
