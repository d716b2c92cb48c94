"""Configuration fields that SFT, the verifier's training and PPO share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..bounds import (
    CountingInt,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SeedInt,
    ShareFloat,
    UnitFloat,
    check_bounds,
)
from .engine import Dtype, EngineConfig, Offload
from .metrics import parse_loggers
from .schedule import ScheduleKind


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Configuration of a training run."""

    data: str
    """Training rows: comma-separated JSON, JSONL or Parquet files, datasets folders or hub ids."""
    output: str
    """Folder that receives everything the run writes."""
    offline: bool = False
    """Connect to nothing but the given servers: models and data must be on this machine."""
    limit: PositiveInt | None = None
    """Number of rows to read from the start of each source; null reads all."""
    seed: SeedInt = 0
    """Seed of every random draw."""

    eval_data: str | None = None
    """Held-out rows, in the formats of `data`."""
    eval_fraction: ShareFloat = 0.0
    """Share of `data` to hold out when there is no `eval_data`; drawn by `seed`."""
    eval_every: CountingInt = 20
    """Steps between evaluations; the last step is always evaluated."""
    save_every: CountingInt = 20
    """Steps between checkpoints; the last step is always saved."""
    save_total_limit: CountingInt = 2
    """Number of checkpoints to keep, not counting the best one."""
    log_to: str = "jsonl,tensorboard"
    """Comma-separated loggers: jsonl, tensorboard, wandb. jsonl is always written."""
    resume: str = "auto"
    """Checkpoint to resume from: auto (the newest in `output`), never (none), or its folder."""
    trust_checkpoint: bool = False
    """Resume from a folder outside `output` too; loading it runs code that its files may hold."""

    warmup_ratio: UnitFloat = 0.05
    """Share of all optimizer steps over which the learning rate rises from zero."""
    schedule: ScheduleKind = "linear"
    """Learning-rate schedule after warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of AdamW; never applied to norms and biases."""
    max_grad_norm: PositiveFloat = 1.0
    """Global norm to which the gradients of each model are clipped."""
    max_skipped_steps: CountingInt = 3
    """Number of consecutive steps with a non-finite gradient at which the run stops."""

    zero_stage: Literal[0, 1, 2, 3] = 3
    """DeepSpeed ZeRO stage: 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    offload: Offload = "none"
    """States kept in host memory: none, optimizer, or all (optimizer states and parameters)."""
    dtype: Dtype = "bf16"
    """Data type of weights and activations."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass instead of storing them."""
    max_tokens_per_gpu: CountingInt = 8192
    """Maximum number of tokens in a micro-batch."""
    timeout_seconds: PositiveFloat = 600.0
    """Seconds that a collective operation may wait before the run ends with an error."""
    heartbeat_seconds: PositiveFloat = 60.0
    """Seconds without a sign of life after which a rank is taken for lost, as by a cut link or a
    stopped host, and the run ends with an error; at most 0.8 of `timeout_seconds` counts."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.eval_data and self.eval_fraction:
            raise ValueError("give eval_data or eval_fraction, not both")
        parse_loggers(self.log_to)
        self.engine  # noqa: B018 runs its own checks

    @property
    def fixed(self) -> tuple[str, ...]:
        """Fields that cannot change when a run resumes; all others take effect."""
        return ("data", "limit", "seed", "eval_data", "eval_fraction", "dtype")

    @property
    def engine(self) -> EngineConfig:
        """Settings of the DeepSpeed engines."""
        return EngineConfig(
            zero_stage=self.zero_stage,
            offload=self.offload,
            dtype=self.dtype,
            gradient_checkpointing=self.gradient_checkpointing,
            max_grad_norm=self.max_grad_norm,
            weight_decay=self.weight_decay,
        )
