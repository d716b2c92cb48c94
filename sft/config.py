"""What supervised training can be told: of the policy (stage 1), and of the verifier."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ..core.llm.client import LLMConfig
from ..core.training.engine import Dtype, EngineConfig, Offload
from ..core.training.metrics import parse_loggers
from ..core.training.schedule import ScheduleKind


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What both trainings share."""

    model: str
    """Hugging Face folder or hub id to start from"""
    data: str
    """training rows: comma-separated JSON, JSONL or Parquet files, datasets folders or hub ids"""
    output: str
    """folder for everything that the run writes"""

    epochs: int = 3
    """passes over the data"""
    max_steps: int | None = None
    """stop after this many optimizer steps instead; the schedule ends there too"""
    batch_size: int = 128
    """sequences an optimizer step, over all ranks"""
    learning_rate: float = 5e-6
    """peak, of AdamW"""
    warmup_ratio: float = 0.05
    """share of all optimizer steps over which the rate climbs"""
    schedule: ScheduleKind = "cosine"
    """of the rate after the warm-up"""
    weight_decay: float = 0.1
    """decoupled, never on norms and biases"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this global norm"""
    overlong: Literal["drop", "refuse"] = "drop"
    """rows over max_seq_len are dropped and counted, or end the run; never cut"""
    limit: int | None = None
    """use only the first rows of each source"""
    seed: int = 0
    """of every random draw"""

    eval_data: str | None = None
    """held-out rows"""
    eval_fraction: float = 0.0
    """or: this share of the data is held out, by seed"""
    eval_every: int = 50
    """optimizer steps between evaluations; there is one after the last step"""
    stop_at_loss: float | None = None
    """end at the first evaluation whose loss (nats per target token) is not above it"""
    save_every: int = 200
    """optimizer steps between checkpoints; there is one after the last step"""
    save_total_limit: int = 2
    """checkpoints kept, besides the best"""
    log_to: str = "jsonl,tensorboard"
    """any of jsonl, tensorboard, wandb; jsonl is always written"""
    resume: str = "auto"
    """auto: go on from the newest checkpoint in output; never; or a checkpoint folder"""

    zero_stage: Literal[0, 1, 2, 3] = 3
    """what DeepSpeed shards over ranks: 1 optimizer states, 2 gradients too, 3 parameters too"""
    offload: Offload = "none"
    """what lives in host memory: none, optimizer, all"""
    dtype: Dtype = "bf16"
    """of weights and activations"""
    gradient_checkpointing: bool = True
    """recompute activations in the backward pass"""
    max_seq_len: int = 8192
    """tokens of the longest row"""
    max_tokens_per_gpu: int = 8192
    """tokens of a pack, which is one forward and backward"""
    max_skipped_steps: int = 3
    """optimizer steps in a row with a gradient that is not finite before the run stops"""
    timeout_seconds: float = 1800.0
    """a collective that waits longer ends the run"""

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "batch_size",
            "eval_every",
            "save_every",
            "save_total_limit",
            "max_seq_len",
            "max_skipped_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("max_steps", "limit", "timeout_seconds"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        for name in ("learning_rate", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio={self.warmup_ratio}: must lie in 0..1")
        if self.max_seq_len > self.max_tokens_per_gpu:
            raise ValueError(
                f"max_seq_len={self.max_seq_len}, over max_tokens_per_gpu={self.max_tokens_per_gpu}: a row must fit in a pack"
            )
        if self.eval_data and self.eval_fraction:
            raise ValueError("give eval_data or eval_fraction, not both")
        if self.stop_at_loss is not None and not (self.eval_data or self.eval_fraction):
            raise ValueError(
                f"stop_at_loss={self.stop_at_loss} needs held-out rows: give eval_data or eval_fraction"
            )
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction={self.eval_fraction}: must lie in 0..1")
        parse_loggers(self.log_to)
        self.engine  # noqa: B018 its own checks

    def total_steps(self, num_rows: int, *, step: int = 0, position: int = 0) -> int:
        """Optimizer steps in all of a run that has taken `position` rows in `step` steps, perhaps under other settings; the
        last batch may be smaller, so that every row is seen `epochs` times."""
        left = math.ceil((num_rows * self.epochs - position) / self.batch_size)
        return self.max_steps if self.max_steps is not None else step + max(0, left)

    @property
    def engine(self) -> EngineConfig:
        return EngineConfig(
            zero_stage=self.zero_stage,
            offload=self.offload,
            dtype=self.dtype,
            gradient_checkpointing=self.gradient_checkpointing,
            max_grad_norm=self.max_grad_norm,
            weight_decay=self.weight_decay,
        )


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainingConfig):
    """Stage 1: packed fine-tuning on the assistant's turn."""

    system_prompt: str | None = None
    """a system turn before every question of Question / Complex_CoT / Response rows"""
    tokenize_workers: int = 1
    """processes that tokenise; the result is cached by content"""


@dataclass(frozen=True, kw_only=True)
class VerifierTrainingConfig(TrainingConfig):
    """Training of the two-class verifier, from rows of (response, reference, label) or from what such rows are made of."""

    template: str | None = None
    """a text file with {response} and {reference} in place of ours"""
    threshold: float = 0.4
    """right when P(right) is above it (arXiv 2412.18925)"""
    wrong_per_question: int = 1
    """rows of wrong options made from each exam question, beside as many right ones"""
    llm: LLMConfig = field(default_factory=LLMConfig)
    """with llm.model: judges the rows that have a response but no label"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: must lie in 0..1")
        if self.wrong_per_question < 1:
            raise ValueError(f"wrong_per_question={self.wrong_per_question}: must be at least 1")
