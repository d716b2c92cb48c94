"""Configuration of the adapters of policy and critic."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.training.lora import LoraConfig


@dataclass(frozen=True, kw_only=True)
class PPOLoraConfig(LoraConfig):
    """Low-rank adapters of policy and critic."""

    critic: bool = True
    """Adapters for the critic too, whose head is trained beside them; false trains it whole."""


def check_lora(
    lora: PPOLoraConfig, *, critic_freeze: str, reference_refresh_steps: int | None
) -> None:
    """Checks that the other options of a run make sense with adapters.

    Raises:
        ValueError: one of them does not.
    """
    if not lora.rank:
        return
    if reference_refresh_steps:
        raise ValueError(
            f"reference_refresh_steps={reference_refresh_steps}: with lora.rank={lora.rank} the "
            "reference is the policy without adapters, which never changes: leave it out"
        )
    if critic_freeze != "none" and lora.critic:
        raise ValueError(
            f"critic_freeze={critic_freeze}: with lora.rank={lora.rank} all weights of the critic "
            "are frozen: leave it out, choose lora.targets, or set lora.critic=false"
        )
