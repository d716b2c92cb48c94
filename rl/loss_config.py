"""Configuration of the KL penalty and of the correction for the sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core.bounds import NonNegativeFloat, PositiveFloat, check_bounds


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """KL penalty that keeps the policy close to the reference."""

    coef: NonNegativeFloat = 0.03
    """beta: reward subtracted per nat of KL divergence from the reference."""
    place: Literal["reward", "loss"] = "reward"
    """Part of the rewards, or a loss with the gradient of the divergence (arXiv 2510.01555)."""
    target: PositiveFloat | None = None
    """KL divergence per response (nats) to which beta adapts (arXiv 1909.08593); null: fixed."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the per-token KL divergence (http://joschu.net/blog/kl-approx.html)."""

    def __post_init__(self) -> None:
        check_bounds(self, prefix="kl.")
        if self.place == "loss" and self.estimator != "k1":
            raise ValueError(
                f"kl.estimator={self.estimator}: kl.place=loss has a gradient of its own, because "
                "that of an estimator is wrong once the policy has moved: leave it at k1"
            )


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """Weights pi_trainer / pi_sampler of the policy loss, for a sampler that differs or lags."""

    level: Literal["none", "token", "sequence", "geometric"] = "none"
    """What a weight belongs to: none, token, sequence, or sequence with its geometric mean."""
    mode: Literal["truncate", "clip", "mask"] = "truncate"
    """Weights out of bounds: truncate those over `high`, clip, or mask (weight 0)."""
    low: NonNegativeFloat = 0.5
    """Lower bound of a weight, for clip and mask."""
    high: PositiveFloat = 2.0
    """Upper bound of a weight."""

    def __post_init__(self) -> None:
        check_bounds(self, prefix="correction.")
        if self.low > self.high:
            raise ValueError(
                f"correction.low={self.low} is over correction.high={self.high}: lower it"
            )
