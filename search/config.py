"""Configuration of the commands `problems` and `search`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..core.bounds import CountingInt, NonNegativeFloat, NonNegativeInt, UnitFloat, check_bounds
from ..core.llm.client import LLMConfig


@dataclass(frozen=True, kw_only=True)
class AskingConfig:
    """Configuration of a command that asks an LLM about every row."""

    data: str
    """Input rows: comma-separated JSON, JSONL or Parquet files, datasets folders or hub ids."""
    output: str
    """Folder that receives the result, journal.jsonl and the report."""
    offline: bool = False
    """Connect to nothing but the given servers: models and data must be on this machine."""
    llm: LLMConfig = field(default_factory=LLMConfig)
    """Model that writes, judges and verifies."""
    language: Literal["en", "zh"] = "en"
    """Language of the prompts, and so of what is written."""
    prompts: str | None = None
    """Folder of Jinja templates that replace ours by name; strategy-NAME.jinja adds a strategy."""
    max_asks: CountingInt = 3
    """Tries for one reply: the first, and those that name the fault of the one before."""
    judge_temperature: NonNegativeFloat = 0.0
    """Temperature of verdicts, judgements and multiple-choice answers."""
    limit: CountingInt | None = None
    """Number of rows to read from the start of each source; null reads all."""
    seed: int = 0
    """Seed of every random draw."""
    resume: str = "auto"
    """auto uses the journal in `output`; never refuses one; or a folder whose journal to copy."""
    retry_failed: bool = False
    """Ask again about the items that failed in an earlier run."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.llm.model:
            raise ValueError("llm.model is not set: give the model's name at the server")


@dataclass(frozen=True, kw_only=True)
class DifficultyConfig:
    """Small models whose common success shows that a question is too easy."""

    models: list[LLMConfig] = field(default_factory=list)
    """LLM clients; a question that all of them answer correctly is dropped (paper: three)."""

    def __post_init__(self) -> None:
        if not all(model.model for model in self.models):
            raise ValueError("difficulty.models: each needs its model's name at the server")


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Questions added to the RL half unchanged; the ratios are the paper's."""

    choice: str | None = None
    """Exam questions to add as multiple choice; those that became a problem are left out."""
    choice_ratio: NonNegativeFloat = 0.2
    """Multiple-choice questions added for each problem of the RL half."""
    general: str | None = None
    """Questions outside medicine to add: exam questions, or rows of verifiable problems."""
    general_ratio: NonNegativeFloat = 0.25
    """General questions added for each problem of the RL half."""

    def __post_init__(self) -> None:
        check_bounds(self, prefix="mix.")


@dataclass(frozen=True, kw_only=True)
class ProblemsConfig(AskingConfig):
    """Turns multiple-choice exam questions into verifiable problems (arXiv 2412.18925)."""

    min_length: int = 100
    """Number of characters under which a question is dropped; a Chinese character counts as 4."""
    unique: bool = True
    """Drop questions that ask for what is false or have several right options."""
    difficulty: DifficultyConfig = field(default_factory=DifficultyConfig)
    judge: bool = True
    """Have the LLM judge each question; only those that pass are rewritten."""
    decontaminate: str | None = None
    """Comma-separated evaluation files; rows that share 64 characters with an item are dropped."""
    mix: MixConfig = field(default_factory=MixConfig)
    split: UnitFloat = 0.5
    """Share of the problems for search and SFT; the others are for RL."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(AskingConfig):
    """Searches a chain of thought that reaches the reference answer (arXiv 2412.18925)."""

    max_depth: NonNegativeInt = 3
    """Strategies in an attempt; the first is never backtracking."""
    max_attempts: CountingInt = 3
    """Attempts, each from the initial chain."""
    label_guided: bool = True
    """After the last attempt, show the model the answer instead of giving up."""
    min_monologue_length: NonNegativeInt = 1300
    """Characters under which a monologue, or one without three paragraphs, is asked for once more;
    a Chinese character counts as 4; 0 accepts any."""
