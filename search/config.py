"""What the making of problems and the search for reasoning can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..core.llm.client import LLMConfig


@dataclass(frozen=True, kw_only=True)
class AskingConfig:
    """What both commands share."""

    data: str
    """input rows: comma-separated JSON, JSONL or Parquet files, datasets folders or hub ids"""
    output: str
    """folder for the result, its halves or baselines, journal.jsonl and the report"""
    llm: LLMConfig = field(default_factory=LLMConfig)
    """the model that writes, judges and verifies"""
    language: Literal["en", "zh"] = "en"
    """of the prompts, and so of what is written"""
    prompts: str | None = None
    """a folder of Jinja templates that take the place of ours by name; strategy-NAME.jinja adds a strategy"""
    max_asks: int = 3
    """asks for one answer: the first, and those that name what was wrong with the one before"""
    judge_temperature: float = 0.0
    """of verdicts, judgements and multiple-choice answers; llm.temperature is that of all else"""
    limit: int | None = None
    """use only the first rows of each source"""
    seed: int = 0
    """of every random draw"""
    resume: str = "auto"
    """auto: go on with the journal in output; never: refuse a folder that has one; or a folder whose journal to start from"""
    retry_failed: bool = False
    """ask again for the items that failed in an earlier run"""

    def __post_init__(self) -> None:
        if not self.llm.model:
            raise ValueError("llm.model is not set: give the model's name at the server")
        for name in ("max_asks", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.judge_temperature >= 0:
            raise ValueError(f"judge_temperature={self.judge_temperature}: must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class DifficultyConfig:
    """The small models whose common success shows that a question is too easy."""

    models: list[LLMConfig] = field(default_factory=list)
    """each with its own base_url; a question that all of them answer correctly is dropped (the paper: three of 7 to 9 B)"""

    def __post_init__(self) -> None:
        if not all(model.model for model in self.models):
            raise ValueError("difficulty.models: each needs its model's name at the server")


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """What is mixed into the RL half unchanged. The ratios are the paper's: 4 K and 5 K to 20 K."""

    choice: str | None = None
    """exam questions to mix in as multiple choice; those that became a problem are left out"""
    choice_ratio: float = 0.2
    """how many, for each problem of the RL half"""
    general: str | None = None
    """questions outside medicine: exam questions, or problems in the published format"""
    general_ratio: float = 0.25
    """how many, for each problem of the RL half"""

    def __post_init__(self) -> None:
        for name in ("choice_ratio", "general_ratio"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"mix.{name}={getattr(self, name)}: must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class ProblemsConfig(AskingConfig):
    """Multiple-choice exam questions become open-ended problems whose answers can be checked (arXiv 2412.18925)."""

    min_length: int = 100
    """characters; shorter questions are dropped"""
    unique: bool = True
    """drop questions that ask for what is false, or whose right option stands for several, before any model is asked"""
    difficulty: DifficultyConfig = field(default_factory=DifficultyConfig)
    judge: bool = True
    """the LLM judges each: pass, too simple, ambiguous answer, not reformulatable; only those that pass go on"""
    decontaminate: str | None = None
    """comma-separated evaluation files: what shares 64 characters in a row with an item of theirs is dropped"""
    mix: MixConfig = field(default_factory=MixConfig)
    split: float = 0.5
    """share of the problems that goes to search and SFT; the rest goes to RL"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.split <= 1:
            raise ValueError(f"split={self.split}: must lie in 0..1")


@dataclass(frozen=True, kw_only=True)
class SearchConfig(AskingConfig):
    """Strategies drawn at random extend a chain of thought until its conclusion agrees with the answer (arXiv 2412.18925)."""

    max_depth: int = 3
    """strategies in one attempt; the first is never backtracking"""
    max_attempts: int = 3
    """attempts, each from the initial chain"""
    label_guided: bool = True
    """after the last attempt, show the model the answer and have it reason its way there, instead of giving up"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("max_depth", 0), ("max_attempts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
