"""Memory of a run by part and phase, from its configuration and the sizes of its models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..core.planning.activations import (
    forward_activations,
    kv_bytes_per_token,
    local_sampler_memory,
    logprob_memory,
    training_activations,
)
from ..core.planning.model_shape import ModelShape
from ..core.planning.model_states import BYTES, ModelStates, frozen_states, trained_states
from .plan_config import MachineConfig, PlanConfig, PPOPlanConfig, SFTPlanConfig

GIB = 2**30
SERVER_ASLEEP = 2 * GIB
"""What a sleeping server keeps on its GPU: CUDA and its compiled graphs."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one part of a run takes."""

    name: str
    gpu: float = 0.0
    """Bytes on each GPU."""
    host: float = 0.0
    """Bytes in each node's host memory."""
    phase: str = ""
    """Phase of the step in which it exists; "": always."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The memory of a run."""

    parts: tuple[Part, ...]
    gpu_limit: float
    host_limit: float

    @cached_property
    def resident(self) -> float:
        """Bytes on each GPU that are held all the time."""
        return sum(part.gpu for part in self.parts if not part.phase)

    @cached_property
    def phases(self) -> dict[str, float]:
        """Bytes on each GPU in each phase, in the order of a step."""
        names = dict.fromkeys(part.phase for part in self.parts if part.phase)
        return {
            name: self.resident + sum(p.gpu for p in self.parts if p.phase == name)
            for name in names
        }

    @property
    def peak_phase(self) -> str:
        """The phase that takes most on a GPU."""
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def gpu(self) -> float:
        """Bytes on each GPU at the peak."""
        return self.phases[self.peak_phase]

    @property
    def host(self) -> float:
        """Bytes in each node's host memory."""
        return sum(part.host for part in self.parts)

    @property
    def fits(self) -> bool:
        """Whether GPU and host are large enough."""
        return self.gpu <= self.gpu_limit and self.host <= self.host_limit


def memory_plan(config: PlanConfig, shapes: Mapping[str, ModelShape]) -> MemoryPlan:
    """Adds up the memory of a run.

    Args:
        config: the run and the machine.
        shapes: sizes of the models by role: policy, critic, reference, verifier; or model.
    """
    if isinstance(config, PPOPlanConfig):
        parts = [*_ppo_parts(config, shapes)]
    else:
        parts = [*_supervised_parts(config, shapes["model"])]
    reserve = 0.0 if config.device == "cpu" else config.gpu_reserve
    if config.device == "cpu":
        parts = [Part(name=p.name, gpu=p.gpu + _per_rank(config, p), phase=p.phase) for p in parts]
    return MemoryPlan(
        parts=tuple(part for part in parts if part.gpu or part.host),
        gpu_limit=(config.gpu_memory - reserve) * GIB,
        host_limit=(config.host_memory - config.host_reserve) * GIB,
    )


def ranks_per_host(config: MachineConfig) -> int:
    """Training processes on each node."""
    return min(config.gpus, config.gpus_per_node)


def _per_rank(config: MachineConfig, part: Part) -> float:
    return part.host / ranks_per_host(config) / config.host_overhead


def _states(config: PlanConfig, shape: ModelShape, *, head: bool) -> ModelStates:
    return trained_states(
        shape.parameters if head else shape.decoder_parameters,
        shape.embedding,
        config.engine,
        ranks=config.gpus,
        device=config.device,
    )


def _host(config: MachineConfig, states: ModelStates) -> float:
    return states.host * ranks_per_host(config) * config.host_overhead


def _trained_parts(
    config: PlanConfig,
    name: str,
    shape: ModelShape,
    *,
    head: bool,
) -> Iterator[Part]:
    """Parts of a model that is trained, in the phases `train NAME` and `step NAME`."""
    states = _states(config, shape, head=head)
    train, step = f"train {name}", f"step {name}"
    yield Part(name=f"{name}: weights", gpu=states.weights)
    yield Part(
        name=f"{name}: optimizer states",
        gpu=states.optimizer,
        host=_host(config, states),
    )
    for phase in [""] if states.gradients_stay else [train, step]:
        yield Part(name=f"{name}: gradients", gpu=states.gradients, phase=phase)
    yield Part(
        name=f"{name}: gradient bucket",
        gpu=states.bucket,
        phase="" if states.gradients_stay else train,
    )
    size = BYTES[config.dtype]
    tokens = config.max_tokens_per_gpu
    yield Part(
        name=f"{name}: activations",
        gpu=training_activations(
            shape,
            tokens,
            size=size,
            checkpointing=config.gradient_checkpointing,
            device=config.device,
        ),
        phase=train,
    )
    if head:
        yield Part(
            name=f"{name}: log-probs and head gradient",
            gpu=logprob_memory(shape, tokens, size=size, backward=True, device=config.device),
            phase=train,
        )
    yield Part(name=f"{name}: gathered weights", gpu=states.gathered, phase=train)
    yield Part(name=f"{name}: optimizer step", gpu=states.step, phase=step)


def _loading(config: PlanConfig, shapes: Iterable[ModelShape]) -> float:
    """Host bytes of weights that are converted while loading; others are mapped from files."""
    size = BYTES[config.dtype]
    converted = [shape.parameters for shape in shapes if shape.dtype != config.dtype]
    return sum(converted) * size * ranks_per_host(config)


def _supervised_parts(config: PlanConfig, shape: ModelShape) -> Iterator[Part]:
    head = isinstance(config, SFTPlanConfig)
    yield from _trained_parts(config, "model", shape, head=head)
    yield Part(name="loading with conversion", host=_loading(config, [shape]), phase="load")


def _ppo_parts(config: PPOPlanConfig, shapes: Mapping[str, ModelShape]) -> Iterator[Part]:
    size = BYTES[config.dtype]
    policy = shapes["policy"]
    frozen = {"reference": shapes["reference"].parameters}
    if "verifier" in shapes:
        frozen["verifier"] = shapes["verifier"].decoder_parameters
    gathered: dict[str, float] = {}
    for name, parameters in frozen.items():
        states = frozen_states(parameters, config.engine, ranks=config.gpus)
        gathered[name] = states.gathered
        yield Part(name=f"{name}: weights", gpu=states.weights, host=_host(config, states))
    yield from _sampler_parts(config, policy)
    if "verifier" in shapes:
        tokens = max(config.max_tokens_per_gpu, config.verifier.max_tokens)
        passed = forward_activations(shapes["verifier"], tokens, size=size)
        yield Part(name="verifier: activations", gpu=passed, phase="score")
        yield Part(name="verifier: gathered weights", gpu=gathered["verifier"], phase="score")
    trained = {"policy": policy} | ({"critic": shapes["critic"]} if "critic" in shapes else {})
    yield from _forward_parts(config, policy, trained, gathered["reference"])
    for name, shape in trained.items():
        yield from _trained_parts(config, name, shape, head=name == "policy")
    loaded = [policy, shapes["reference"]]
    yield Part(name="loading with conversion", host=_loading(config, loaded), phase="load")


def _forward_parts(
    config: PPOPlanConfig,
    policy: ModelShape,
    trained: Mapping[str, ModelShape],
    reference_gathered: float,
) -> Iterator[Part]:
    """The passes without gradients that fix the targets of a step, one model after another."""
    size = BYTES[config.dtype]
    tokens = config.max_tokens_per_gpu
    states = [_states(config, shape, head=name == "policy") for name, shape in trained.items()]
    yield Part(
        name="passes without gradients: activations",
        gpu=max(forward_activations(shape, tokens, size=size) for shape in trained.values()),
        phase="forward",
    )
    yield Part(
        name="passes without gradients: log-probs",
        gpu=logprob_memory(
            policy, tokens, size=size, backward=False, entropy=True, device=config.device
        ),
        phase="forward",
    )
    yield Part(
        name="passes without gradients: gathered weights",
        gpu=max(reference_gathered, *(s.gathered for s in states), 0.0),
        phase="forward",
    )


def _sampler_parts(config: PPOPlanConfig, policy: ModelShape) -> Iterator[Part]:
    size = BYTES[config.dtype]
    if config.sampler.kind == "local":
        slots = min(config.sampler.max_batch, -(-config.rollouts_per_step // config.gpus))
        cache, work = local_sampler_memory(
            policy,
            slots=slots,
            prompt_tokens=config.max_prompt_tokens,
            new_tokens=config.sampling.max_new_tokens,
            size=size,
        )
        yield Part(name="local sampler: weights", gpu=size * policy.parameters)
        yield Part(name="local sampler: key-value cache", gpu=cache, phase="rollout")
        yield Part(name="local sampler: prompts and draws", gpu=work, phase="rollout")
        return
    yield Part(name="largest weight, gathered", gpu=size * policy.embedding, phase="sync")
    if config.sampler.kind == "sglang" and not config.server_gpus:
        server = config.server_mem_fraction * config.gpu_memory * GIB
        asleep = SERVER_ASLEEP if config.sampler.sleep else server
        yield Part(name="servers: asleep" if config.sampler.sleep else "servers", gpu=asleep)
        yield Part(name="servers: awake", gpu=server - asleep, phase="rollout")
        yield Part(name="servers: awake", gpu=server - asleep, phase="sync")


def server_cache_tokens(config: PPOPlanConfig, policy: ModelShape) -> int:
    """Tokens that the key-value cache of one server holds; 0 or less: the weights do not fit."""
    size = BYTES[config.dtype]
    memory = config.server_mem_fraction * config.gpu_memory * GIB * config.server_tp
    free = memory - size * policy.parameters
    return int(free / kv_bytes_per_token(policy, size=size))
