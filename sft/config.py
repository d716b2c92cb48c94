"""Configuration of supervised training: of the policy (stage 1) and of the verifier."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ..core.bounds import CountingInt, NonNegativeFloat, PositiveInt, UnitFloat
from ..core.llm.client import LLMConfig
from ..core.training.lora import LoraConfig
from ..core.training.run_config import RunConfig
from ..core.training.schedule import ScheduleKind
from .conversations import AnswerColumns, Columns


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RunConfig):
    """Configuration of a supervised training run. Each field is also a command-line option."""

    model: str
    """Model to start from: a Hugging Face folder or hub id."""
    epochs: CountingInt = 3
    """Passes over the training rows."""
    max_steps: PositiveInt | None = None
    """Number of optimizer steps, in place of `epochs`; the schedule ends there too."""
    batch_size: CountingInt = 128
    """Rows per optimizer step, over all ranks."""
    max_seq_len: CountingInt = 8192
    """Maximum number of tokens in a row; see `overlong`."""
    overlong: Literal["drop", "refuse"] = "drop"
    """Rows over `max_seq_len`: drop and count them, or refuse to start. Rows are never cut."""
    learning_rate: NonNegativeFloat = 5e-6
    """Learning rate of AdamW at the end of warm-up."""
    schedule: ScheduleKind = "cosine"
    """Learning-rate schedule after warm-up."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of AdamW; never applied to norms and biases."""
    eval_every: CountingInt = 50
    """Optimizer steps between evaluations; the last step is always evaluated."""
    stop_at_loss: float | None = None
    """End the run at the first evaluation with at most this loss (nats per target token)."""
    save_every: CountingInt = 200
    """Optimizer steps between checkpoints; the last step is always saved."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_seq_len > self.max_tokens_per_gpu:
            raise ValueError(
                f"max_seq_len={self.max_seq_len} is over max_tokens_per_gpu="
                f"{self.max_tokens_per_gpu}: a row must fit into a micro-batch"
            )
        if self.stop_at_loss is not None and not (self.eval_data or self.eval_fraction):
            raise ValueError(
                f"stop_at_loss={self.stop_at_loss} needs held-out rows: give eval_data or "
                "eval_fraction"
            )

    @property
    def fixed(self) -> tuple[str, ...]:
        return (*super().fixed, "model", "max_seq_len", "overlong")

    def total_steps(
        self,
        num_rows: int,
        *,
        step: int = 0,
        position: int = 0,
    ) -> int:
        """Number of optimizer steps of the whole run.

        The last batch may be smaller, so that every row is seen `epochs` times.

        Args:
            num_rows: training rows.
            step: steps done so far, perhaps with another batch size.
            position: rows taken in those steps.
        """
        if self.max_steps is not None:
            return self.max_steps
        remaining = math.ceil((num_rows * self.epochs - position) / self.batch_size)
        return step + max(0, remaining)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainingConfig):
    """Configuration of stage 1: packed fine-tuning on the assistant's turn."""

    columns: Columns = field(default_factory=Columns)
    """Keys of question, reasoning and response in a data row."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters of the model."""
    system_prompt: str | None = None
    """System turn of rows that have none of their own."""
    tokenize_workers: CountingInt = 1
    """Processes that tokenise rows; the result is cached by content."""

    @property
    def fixed(self) -> tuple[str, ...]:
        return (*super().fixed, "columns", "lora", "system_prompt")


@dataclass(frozen=True, kw_only=True)
class VerifierTrainingConfig(TrainingConfig):
    """Configuration of the two-class verifier's training."""

    columns: AnswerColumns = field(default_factory=AnswerColumns)
    """Keys of response, reference and label in a data row."""
    template: str | None = None
    """Text file with {response} and {reference}, in place of the built-in template."""
    threshold: UnitFloat = 0.4
    """An answer counts as right when P(right) is above this value (arXiv 2412.18925)."""
    wrong_per_question: CountingInt = 1
    """Wrong options used per exam question, next to as many copies of the right one."""
    llm: LLMConfig = field(default_factory=LLMConfig)
    """LLM judge that labels rows which have a response but no label; off without `llm.model`."""

    @property
    def fixed(self) -> tuple[str, ...]:
        return (*super().fixed, "columns", "template", "wrong_per_question")
