"""When the critic's warm-up ends before its planned steps are over."""

from __future__ import annotations

from collections.abc import Mapping

LEAST_GAIN = 0.01
"""Rise of the explained variance that counts as progress."""
STEPS = "critic_warmup_steps"
"""Entry for the number of steps of a warm-up that has ended early."""


def follow_warmup(
    progress: Mapping[str, float],
    *,
    step: int,
    explained_variance: float,
    patience: int,
) -> dict[str, float]:
    """Progress of the warm-up after one of its steps.

    The explained variance has settled when it has not risen to LEAST_GAIN above its best for
    `patience` steps.

    Args:
        progress: what the last step returned, with other entries or without; empty at first.
        step: number of the step, from 1.
        explained_variance: of the critic in this step; NaN is no progress.
        patience: number of steps without progress after which the warm-up ends.

    Returns:
        Entries to be kept until the next step; with STEPS among them, the warm-up is over.

    Source: arXiv 2503.01491, section 4.1, trains until value loss and explained variance settle.
    """
    best = progress.get("critic_warmup_best")
    last_gain = int(progress.get("critic_warmup_last_gain", step))
    if best is None or explained_variance >= best + LEAST_GAIN:
        return {"critic_warmup_best": explained_variance, "critic_warmup_last_gain": step}
    return {STEPS: step} if step - last_gain >= patience else {}
