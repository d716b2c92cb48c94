"""Configuration of a critic's pre-training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..core.bounds import CountingInt, NonNegativeFloat, PositiveInt, ShareFloat, UnitFloat
from ..core.training.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class CriticConfig(RunConfig):
    """Configuration of a critic's pre-training. Each field is also a command-line option."""

    data: str
    """Rollouts of `ppo --keep_rollouts true`: comma-separated folders or files of them."""
    eval_data: str | None = None
    """Held-out rollouts, likewise."""
    eval_fraction: ShareFloat = 0.0
    """Share of the problems to hold out when there is no `eval_data`; drawn by `seed`."""
    model: str
    """Model whose decoder becomes the critic: a Hugging Face folder or hub id."""
    critic_head: Literal["auto", "fresh", "kept"] = "auto"
    """Value head: fresh (zero), kept (that of the model's folder), or auto (kept if it has one)."""
    critic_freeze: Literal["none", "attention"] = "none"
    """attention: train only MLPs, norms and head of the critic; attention and embeddings stay."""
    epochs: CountingInt = 1
    """Passes over the rollouts."""
    max_steps: PositiveInt | None = None
    """Number of optimizer steps, in place of `epochs`; the schedule ends there too."""
    batch_size: CountingInt = 128
    """Rollouts per optimizer step, over all ranks."""
    gamma: UnitFloat = 1.0
    """Discount factor of rewards per token in the returns, which are those of lam_critic=1."""
    learning_rate: NonNegativeFloat = 5e-6
    """Learning rate of AdamW at the end of warm-up."""

    @property
    def fixed(self) -> tuple[str, ...]:
        return (*super().fixed, "model", "critic_head", "critic_freeze", "gamma")

    def total_steps(
        self,
        num_rollouts: int,
        *,
        step: int,
        position: int,
    ) -> int:
        """Number of optimizer steps of the whole run.

        Args:
            num_rollouts: rollouts to train on.
            step: steps done so far, perhaps with another batch size.
            position: rollouts taken in those steps.
        """
        if self.max_steps is not None:
            return self.max_steps
        remaining = math.ceil((num_rollouts * self.epochs - position) / self.batch_size)
        return step + max(0, remaining)
