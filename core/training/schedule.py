"""Learning-rate schedules."""

from __future__ import annotations

import math
from typing import Literal

ScheduleKind = Literal["linear", "cosine", "constant"]


def learning_rate(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_ratio: float,
    kind: ScheduleKind,
) -> float:
    """Learning rate of one optimizer step.

    Rises linearly over the warm-up, then stays constant, or falls to zero linearly or along a half
    cosine. The first step's rate is never zero.

    Args:
        step: number of the optimizer step, from 0.
        peak: rate at the end of warm-up.
        total_steps: optimizer steps of the whole run.
        warmup_ratio: share of the steps that belongs to the warm-up.
        kind: "linear", "cosine" or "constant".
    """
    warmup_steps = math.ceil(total_steps * warmup_ratio)
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)  # in this order it never exceeds the peak
    if kind == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if kind == "linear":
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
