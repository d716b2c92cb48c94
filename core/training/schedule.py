"""Learning-rate schedules. Pure."""

from __future__ import annotations

import math
from typing import Literal

ScheduleKind = Literal["linear", "cosine", "constant"]


def learning_rate(
    step: int, *, peak: float, total_steps: int, warmup_ratio: float, kind: ScheduleKind
) -> float:
    """The rate of optimizer step `step` (from 0): a linear climb over the first `warmup_ratio` of all steps, then
    constant, or down to zero linearly or along a half cosine. The first step's rate is never zero."""
    warmup_steps = math.ceil(total_steps * warmup_ratio)
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)  # in this order never over the peak
    if kind == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return (
        peak * (1.0 - progress)
        if kind == "linear"
        else peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    )
