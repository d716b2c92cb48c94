"""Configuration of `verippo plan`: the options of a stage, and the machine to plan it for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core.bounds import (
    CountingInt,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    UnitFloat,
    check_bounds,
)
from ..rl.config import PPOConfig
from ..sft.config import SFTConfig, TrainingConfig, VerifierTrainingConfig


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """The machine to plan for, and assumptions about its speed."""

    gpus: CountingInt = 8
    """GPUs of the training, over all nodes."""
    gpus_per_node: CountingInt = 8
    """GPUs of a node."""
    gpu_memory: PositiveFloat = 80.0
    """Memory of a GPU in GiB."""
    host_memory: PositiveFloat = 1024.0
    """Memory of a node's host in GiB."""
    gpu_reserve: NonNegativeFloat = 4.0
    """GiB of each GPU kept for CUDA, NCCL and fragmentation."""
    host_reserve: NonNegativeFloat = 64.0
    """GiB of each host kept for the system and the ranks' processes."""
    host_overhead: PositiveFloat = 1.5
    """Factor on offloaded states: torch rounds pinned buffers up to powers of two."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: --gpus counts processes and --gpu_memory is the memory of each."""
    model_configs: str | None = None
    """Folder with NAME/config.json for names of models that have no folder of their own here."""
    server_gpus: NonNegativeInt = 0
    """GPUs of the sglang servers apart from those of the training; 0: they share the same."""
    server_tp: CountingInt = 1
    """GPUs that share one copy of a server's weights."""
    server_mem_fraction: UnitFloat = 0.4
    """Share of a GPU's memory that a server takes for weights and key-value cache."""
    tflops: PositiveFloat = 989.0
    """Peak of a GPU in TFLOP/s, dense bf16: H100 989, A100 312, RTX 4090 165."""
    mfu: UnitFloat = 0.35
    """Share of that peak which passes over packed sequences achieve."""
    memory_bandwidth: PositiveFloat = 3350.0
    """Bandwidth of a GPU's memory in GB/s: H100 3350, A100 2039, RTX 4090 1008."""
    memory_efficiency: UnitFloat = 0.6
    """Share of that bandwidth which decoding achieves."""
    launch_microseconds: NonNegativeFloat = 400.0
    """Time per layer and token in which the local sampler launches kernels; servers hide it."""
    node_bandwidth: PositiveFloat = 200.0
    """GB/s that each GPU exchanges with others of its node."""
    network_bandwidth: PositiveFloat = 40.0
    """GB/s that each GPU exchanges with other nodes."""
    pcie_bandwidth: PositiveFloat = 25.0
    """GB/s between a GPU and its host."""
    host_bandwidth: PositiveFloat = 200.0
    """GB/s of a host's memory."""
    disk_bandwidth: PositiveFloat = 2.0
    """GB/s of the folder through which sync=disk sends weights."""
    json: str | None = None
    """File that receives the plan as JSON; `-` prints one JSON line in place of the table."""


@dataclass(frozen=True, kw_only=True)
class PPOPlanConfig(PPOConfig, MachineConfig):
    """Plans a PPO run: memory, operations and time on a given machine, before any weight is read.

    The options are those of `verippo ppo`, and the following.
    """

    data: str = ""
    """Not read."""
    output: str = "plan"
    """Not written."""
    mean_prompt_tokens: PositiveFloat | None = None
    """Mean length of a prompt; null: a quarter of max_prompt_tokens."""
    mean_response_tokens: PositiveFloat | None = None
    """Mean length of a response; null: half of sampling.max_new_tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_machine(self)


@dataclass(frozen=True, kw_only=True)
class SupervisedPlanConfig(TrainingConfig, MachineConfig):
    """What the plans of stage 1 and of the verifier's training share."""

    mean_row_tokens: PositiveFloat | None = None
    """Mean length of a row; null: an eighth of max_seq_len."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_machine(self)


@dataclass(frozen=True, kw_only=True)
class SFTPlanConfig(SFTConfig, SupervisedPlanConfig):
    """Plans stage 1: memory, operations and time on a given machine, before any weight is read.

    The options are those of `verippo sft`, and the following.
    """

    data: str = ""
    """Not read."""
    output: str = "plan"
    """Not written."""


@dataclass(frozen=True, kw_only=True)
class VerifierPlanConfig(VerifierTrainingConfig, SupervisedPlanConfig):
    """Plans the verifier's training, as the other plans do.

    The options are those of `verippo verifier`, and the following.
    """

    data: str = ""
    """Not read."""
    output: str = "plan"
    """Not written."""


PlanConfig = PPOPlanConfig | SFTPlanConfig | VerifierPlanConfig


def check_machine(config: MachineConfig) -> None:
    """Checks what the machine's options say together.

    Raises:
        ValueError: a value breaks its bounds, or the GPUs fill no whole number of nodes.
    """
    check_bounds(config)
    if config.gpus > config.gpus_per_node and config.gpus % config.gpus_per_node:
        raise ValueError(
            f"gpus={config.gpus}: is not a multiple of gpus_per_node={config.gpus_per_node}"
        )
    if config.server_gpus % config.server_tp:
        raise ValueError(
            f"server_gpus={config.server_gpus}: is not a multiple of server_tp={config.server_tp}"
        )
    if config.gpu_reserve >= config.gpu_memory:
        raise ValueError(
            f"gpu_reserve={config.gpu_reserve} leaves nothing of gpu_memory={config.gpu_memory}: "
            "lower it"
        )
