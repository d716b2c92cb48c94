"""Operations, traffic and expected seconds of a step, by phase."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..core.planning import duration
from ..core.planning.duration import Speed
from ..core.planning.model_shape import ModelShape
from ..core.planning.model_states import BYTES
from .plan_config import MachineConfig, PlanConfig, PPOPlanConfig, SFTPlanConfig
from .plan_memory import ranks_per_host, server_cache_tokens

GIGA = 1e9
SERVER_SLOTS = 256
"""Responses that a server decodes at once, if its cache holds them."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What one phase of a step does."""

    name: str
    flops: float = 0.0
    """Floating-point operations, over all GPUs."""
    traffic: float = 0.0
    """Bytes that each GPU exchanges with other GPUs, or that the weights take on their way."""
    seconds: float = 0.0


def time_plan(config: PlanConfig, shapes: Mapping[str, ModelShape]) -> tuple[Phase, ...]:
    """Estimates the phases of one step.

    Args:
        config: the run and the machine.
        shapes: sizes of the models by role: policy, critic, reference, verifier; or model.
    """
    if isinstance(config, PPOPlanConfig):
        return tuple(_ppo_phases(config, shapes))
    rows = config.mean_row_tokens or config.max_seq_len / 8
    return tuple(
        _trained_phases(
            config,
            "model",
            shapes["model"],
            tokens=config.batch_size * rows,
            context=rows,
            head=isinstance(config, SFTPlanConfig),
        )
    )


def speed(config: MachineConfig) -> Speed:
    """Speeds of the machine in operations and bytes per second."""
    nodes = math.ceil(config.gpus / config.gpus_per_node)
    link = config.node_bandwidth if nodes == 1 else config.network_bandwidth
    return Speed(
        flops=config.tflops * 1e12 * config.mfu,
        memory=config.memory_bandwidth * GIGA * config.memory_efficiency,
        link=link * GIGA,
        pcie=config.pcie_bandwidth * GIGA,
        host=config.host_bandwidth * GIGA,
        disk=config.disk_bandwidth * GIGA,
    )


def mean_lengths(config: PPOPlanConfig) -> tuple[float, float]:
    """Mean tokens of prompts and responses."""
    prompt = config.mean_prompt_tokens or config.max_prompt_tokens / 4
    response = config.mean_response_tokens or config.sampling.max_new_tokens / 2
    return prompt, response


def _passes(config: PlanConfig, tokens: float) -> int:
    """Micro-batches of each rank."""
    return max(1, math.ceil(tokens / config.gpus / config.max_tokens_per_gpu))


def _trained_phases(
    config: PlanConfig,
    name: str,
    shape: ModelShape,
    *,
    tokens: float,
    context: float,
    head: bool,
    epochs: int = 1,
    steps: int = 1,
) -> Iterator[Phase]:
    """Forward and backward passes over `tokens` tokens, `epochs` times, and optimizer steps."""
    size = BYTES[config.dtype]
    machine = speed(config)
    checkpointing = config.gradient_checkpointing
    parameters = shape.parameters if head else shape.decoder_parameters
    flops = epochs * duration.training_flops(
        shape, tokens, context=context, checkpointing=checkpointing, head=head
    )
    sharding = {"size": size, "stage": config.zero_stage, "ranks": config.gpus}
    micro_batches = epochs * steps * _passes(config, tokens / steps)
    passes = micro_batches * (3 if checkpointing else 2)
    gathered = duration.gather_bytes(parameters, **sharding, passes=passes)
    reductions = micro_batches if config.zero_stage >= 2 else epochs * steps
    reduced = reductions * duration.reduce_bytes(parameters, **sharding)
    compute = flops / config.gpus / machine.flops
    exchange = (gathered + reduced) / machine.link
    # ZeRO-3 communicates while it computes
    seconds = max(compute, exchange) if config.zero_stage == 3 else compute + exchange
    if config.offload == "all":
        seconds = max(seconds, passes * size * parameters / config.gpus / machine.pcie)
    yield Phase(name=f"train {name}", flops=flops, traffic=gathered + reduced, seconds=seconds)
    step = duration.optimizer_seconds(
        parameters,
        ranks=1 if config.zero_stage == 0 else config.gpus,
        ranks_per_host=ranks_per_host(config),
        offloaded=config.offload != "none",
        speed=machine,
    )
    yield Phase(name=f"step {name}", seconds=epochs * steps * step)


def _frozen_phase(
    config: PlanConfig,
    name: str,
    models: list[tuple[ModelShape, bool]],
    *,
    tokens: float,
    context: float,
) -> Phase:
    """Passes without gradients over `tokens` tokens by models with or without their head."""
    machine = speed(config)
    flops = traffic = seconds = 0.0
    for shape, head in models:
        work = duration.forward_flops(shape, tokens, context=context, head=head)
        gathered = duration.gather_bytes(
            shape.parameters,
            size=BYTES[config.dtype],
            stage=config.zero_stage,
            ranks=config.gpus,
            passes=_passes(config, tokens),
        )
        flops += work
        traffic += gathered
        seconds += max(work / config.gpus / machine.flops, gathered / machine.link)
    return Phase(name=name, flops=flops, traffic=traffic, seconds=seconds)


def _ppo_phases(config: PPOPlanConfig, shapes: Mapping[str, ModelShape]) -> Iterator[Phase]:
    prompt, response = mean_lengths(config)
    context = prompt + response
    tokens = config.rollouts_per_step * context
    policy = shapes["policy"]
    yield _rollout(config, policy, prompt, response)
    if "verifier" in shapes:
        read = min(config.verifier.max_tokens, response)
        scored = config.rollouts_per_step * read
        verifier = [(shapes["verifier"], False)]
        yield _frozen_phase(config, "score", verifier, tokens=scored, context=read)
    models = [(policy, True), (shapes["reference"], True)]
    models += [(shapes["critic"], False)] if "critic" in shapes else []
    yield _frozen_phase(config, "forward", models, tokens=tokens, context=context)
    trained = [("policy", config.epochs), ("critic", config.critic_epochs or config.epochs)]
    for name, epochs in trained:
        if name in shapes:
            yield from _trained_phases(
                config,
                name,
                shapes[name],
                tokens=tokens,
                context=context,
                head=name == "policy",
                epochs=epochs,
                steps=config.minibatches,
            )
    yield _sync(config, policy)


def _rollout(
    config: PPOPlanConfig,
    policy: ModelShape,
    prompt: float,
    response: float,
) -> Phase:
    size = BYTES[config.dtype]
    machine = speed(config)
    local = config.sampler.kind == "local"
    gpus = config.gpus if local else config.server_gpus or config.gpus
    copies = gpus if local else max(1, gpus // config.server_tp)
    own = config.rollouts_per_step / copies
    if local:
        slots = min(config.sampler.max_batch, own)
    else:
        held = server_cache_tokens(config, policy) / (prompt + response)
        slots = max(1.0, min(own, SERVER_SLOTS, held))
    decode = duration.decode_seconds(
        policy,
        slots=slots,
        context=prompt + response / 2,
        size=size,
        speed=machine,
        tensor_parallel=1 if local else config.server_tp,
        launch=config.launch_microseconds * 1e-6 * policy.layers if local else 0.0,
    )
    read = config.rollouts_per_step * prompt
    flops = duration.forward_flops(policy, read, context=prompt)
    prefill = flops / gpus / machine.flops
    flops += duration.forward_flops(
        policy, config.rollouts_per_step * response, context=2 * (prompt + response / 2)
    )
    # the last responses run to the limit while others have ended
    longest = config.sampling.max_new_tokens
    seconds = prefill + decode * max(longest, own / slots * response)
    return Phase(name="rollout", flops=flops, seconds=seconds)


def _sync(config: PPOPlanConfig, policy: ModelShape) -> Phase:
    """The policy's weights to the sampler: gathered, then copied, broadcast or written and read."""
    size = BYTES[config.dtype] * policy.parameters
    machine = speed(config)
    stage = {"size": BYTES[config.dtype], "stage": config.zero_stage, "ranks": config.gpus}
    traffic = duration.gather_bytes(policy.parameters, **stage, passes=1)
    seconds = traffic / machine.link
    if config.sampler.kind == "sglang":
        traffic += size
        way = {"disk": machine.disk / 2, "tensor": machine.pcie, "distributed": machine.link}
        seconds += size / way[config.sampler.sync]
    return Phase(name="sync", traffic=traffic, seconds=seconds)
