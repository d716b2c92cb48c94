"""The smallest machine that a run fits on, and what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..core.planning.model_shape import ModelShape
from .plan_config import PlanConfig, PPOPlanConfig
from .plan_memory import MemoryPlan, memory_plan

MAX_GPUS = 1024
"""Largest machine that is considered."""


def smallest_machine(config: PlanConfig, shapes: Mapping[str, ModelShape]) -> int | None:
    """The smallest number of GPUs of this kind on which the run fits.

    Within a node it is a power of two; beyond, whole nodes. Rollouts of a step must divide over
    the GPUs.

    Args:
        config: the run and the machine.
        shapes: sizes of the models by role.

    Returns:
        The number; None when not even MAX_GPUS are enough.
    """
    for gpus in _machine_sizes(config.gpus_per_node):
        if isinstance(config, PPOPlanConfig) and config.rollouts_per_step % gpus:
            continue
        if memory_plan(replace(config, gpus=gpus), shapes).fits:
            return gpus
    return None


def _machine_sizes(gpus_per_node: int) -> Iterator[int]:
    gpus = 1
    while gpus < gpus_per_node:
        yield gpus
        gpus *= 2
    yield from range(gpus_per_node, MAX_GPUS + 1, gpus_per_node)


def changes(config: PlanConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes that save memory, those that cost least first: what to write, and the fields.

    The last ones move work elsewhere and slow a step most.
    """
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing=true", {"gradient_checkpointing": True}
    if config.zero_stage < 3 and config.gpus > 1:
        yield "zero_stage=3", {"zero_stage": 3}
    longest = _longest_sequence(config)
    half = max(longest, config.max_tokens_per_gpu // 2)
    if half < config.max_tokens_per_gpu:
        yield f"max_tokens_per_gpu={half}", {"max_tokens_per_gpu": half}
    if isinstance(config, PPOPlanConfig) and config.sampler.kind == "local":
        fewer = max(1, config.sampler.max_batch // 4)
        if fewer < config.sampler.max_batch:
            sampler = replace(config.sampler, max_batch=fewer)
            yield f"sampler.max_batch={fewer}", {"sampler": sampler}
    if config.offload == "none":
        stage = {"zero_stage": 2} if config.zero_stage == 0 else {}
        text = "offload=optimizer" + (" with zero_stage=2" if stage else "")
        yield text, {"offload": "optimizer"} | stage
    if isinstance(config, PPOPlanConfig) and config.sampler.kind == "local":
        sampler = replace(config.sampler, kind="sglang", urls="http://127.0.0.1:30000")
        servers = {"sampler": sampler, "server_gpus": config.gpus * config.server_tp}
        yield "sampler.kind=sglang with servers on other GPUs", servers
    if config.offload != "all":
        yield "offload=all with zero_stage=3", {"offload": "all", "zero_stage": 3}
    if longest < half:
        yield f"max_tokens_per_gpu={longest}", {"max_tokens_per_gpu": longest}


def _longest_sequence(config: PlanConfig) -> int:
    if isinstance(config, PPOPlanConfig):
        return config.max_prompt_tokens + config.sampling.max_new_tokens
    return config.max_seq_len


def first_changes(
    config: PlanConfig,
    shapes: Mapping[str, ModelShape],
    plan: MemoryPlan,
) -> tuple[list[str], PlanConfig]:
    """What to change first where a run does not fit.

    Args:
        config: the run and the machine.
        shapes: sizes of the models by role.
        plan: the memory of the run.

    Returns:
        One change that is enough, or several that are together, or all that help; and the
        configuration with them.
    """
    if plan.fits:
        return [], config
    options = list(changes(config))
    for text, fields in options:
        changed = replace(config, **fields)
        if memory_plan(changed, shapes).fits:
            return [text], changed
    chosen = []
    for text, fields in options:
        changed = replace(config, **fields)
        after = memory_plan(changed, shapes)
        if after.gpu < plan.gpu and after.host <= max(plan.host, after.host_limit):
            config, plan = changed, after
            chosen.append(text)
        if plan.fits:
            break
    return chosen, config
