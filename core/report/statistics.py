"""Confidence intervals that reports and evaluations share."""

from __future__ import annotations

import math
from typing import NamedTuple

from scipy.stats import norm

Z_95 = float(norm.ppf(0.975))
"""Quantile of the standard normal distribution that bounds a two-sided 95 % interval."""


class Interval(NamedTuple):
    """A value and the bounds of its 95 % interval, each None where it is unknown."""

    value: float | None
    low: float | None = None
    high: float | None = None


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
