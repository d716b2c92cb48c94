"""Configuration of `verippo eval` and `verippo eval compare`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from ..core.bounds import Bounds, CountingInt, NonNegativeFloat, NonNegativeInt, check_bounds
from ..core.llm.config import LLMConfig
from ..core.sampling.server_command import ServerConfig
from ..core.training.engine import Dtype

NucleusFloat = Annotated[
    float,
    Bounds(
        low=0,
        high=1,
        low_excluded=True,
        rule="must lie in (0, 1]",
    ),
]
Scoring = Literal["strict_cascade", "original"]
FIXED = (
    "model",
    "engine",
    "endpoint",
    "prompt",
    "system_prompt",
    "temperature",
    "top_p",
    "max_new_tokens",
    "scoring",
    "seed",
    "dtype",
    "llm.model",
)
"""Settings that make an evaluation another one."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measures a model's accuracy on multiple-choice questions.

    The defaults are those of the published evaluation.
    """

    data: str
    """Comma-separated files in the evaluation format:
    {"source": [{question, options, answer_idx, answer}, ...]}."""
    output: str
    """Folder for results.json, answers.jsonl, report.html and the journal."""
    offline: bool = False
    """Connect to nothing but the given servers: models and data must be on this machine."""
    model: str = ""
    """Hugging Face folder or hub id. The local and serve engines load its weights; the completions
    endpoint uses its chat template; otherwise, the name by which the server knows the model."""

    engine: Literal["openai", "local", "serve"] = "openai"
    """Where the model runs. openai: a running sglang or other OpenAI-compatible server; serve: an
    sglang server that is started for this run and stopped at its end; local: this process, for
    small models."""
    base_url: str | None = None
    """URL of the running server, such as http://127.0.0.1:30000/v1."""
    endpoint: Literal["completions", "chat"] = "completions"
    """Server endpoint. completions: the chat template of `model` is applied here; chat: the server
    applies its own."""
    prompt: Literal["free", "strict", "thinking"] = "strict"
    """Instructions in the prompt. free: only the question; strict: also asks for "The answer is
    A."; thinking: also asks for `## Thinking` and `## Final Response`."""
    system_prompt: str | None = None
    """System message before every question."""
    runs: CountingInt = 1
    """Number of answers drawn for every item."""
    permutations: NonNegativeInt = 0
    """Number of random orders of the options in which every item is asked, besides the file's
    order. They show whether the model prefers some positions."""
    temperature: NonNegativeFloat = 0.5
    """Sampling temperature; 0 always takes the most likely token."""
    top_p: NucleusFloat | None = None
    """Probability mass of nucleus sampling. Default: 0.9 with a server; 1, the only possible value,
    with the local engine."""
    max_new_tokens: CountingInt = 2000
    """Maximum number of tokens in an answer; a longer answer is cut and counted as truncated."""

    scoring: Scoring = "strict_cascade"
    """Scoring of the headline accuracy; the other is reported beside it. original: as the
    published numbers were scored."""
    skip_bad: bool = False
    """Leave out malformed items, and list and count them, instead of refusing the file."""
    limit: CountingInt | None = None
    """Maximum number of items taken from each source."""
    seed: int = 0
    """Seed of every draw, combined with (item, run, permutation)."""
    resume: Literal["auto", "never"] = "auto"
    """auto: reuse the answers in the journal of `output`, whose items and runs may be added to but
    whose settings may not change; never: refuse a folder that has a journal."""
    retry_failed: bool = False
    """Ask again about the items that failed for good in an earlier run."""

    dtype: Dtype = "bf16"
    """Data type of the weights (local engine)."""
    max_batch: CountingInt = 64
    """Number of answers generated at once (local engine)."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """Options of the server that the serve engine starts; its model is `model`."""
    llm: LLMConfig = field(default_factory=LLMConfig)
    """Options of the client: concurrency, retries, timeouts, keys and budget. base_url, temperature
    and max_new_tokens are options of their own."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.temperature == 0 and self.runs > 1:
            raise ValueError(
                f"runs={self.runs} at temperature=0 gives {self.runs} equal answers: "
                "raise the temperature, or use runs=1"
            )
        for name in ("base_url", "temperature", "max_new_tokens"):
            value = getattr(self.llm, name)
            if value != getattr(LLMConfig, name):
                raise ValueError(f"llm.{name}={value}: use --{name} instead")
        if self.server.model:
            raise ValueError(f"server.model={self.server.model}: use --model instead")
        self._check_engine()

    def _check_engine(self) -> None:
        chat = self.endpoint == "chat"
        if not self.model and not (self.engine == "openai" and chat and self.llm.model):
            raise ValueError(
                "model is missing: set --model to a folder or hub id "
                "(with --endpoint chat, --llm.model is enough)"
            )
        if self.engine == "openai" and not chat and not self.base_url:
            raise ValueError("engine openai needs a server: set --base_url http://HOST:PORT/v1")
        if self.engine != "openai" and self.base_url:
            raise ValueError(
                f"engine {self.engine} uses no running server: "
                "drop --base_url, or use --engine openai"
            )
        if self.engine == "local" and chat:
            raise ValueError("engine local has no endpoint chat: drop --endpoint")
        if self.engine == "local" and self.nucleus != 1:
            raise ValueError(
                f"top_p={self.top_p}: the local engine samples the whole distribution: "
                "drop --top_p, or use a server"
            )

    def fixed(self, before: Mapping[str, Any]) -> list[str]:
        """Lists the settings that must be equal for a folder's evaluation to be continued.

        Items, runs and permutations may be added, but none taken away.

        Args:
            before: The evaluation's settings, from its config.yaml.
        """
        smaller = [name for name in ("runs", "permutations") if getattr(self, name) < before[name]]
        if (self.limit or math.inf) < (before["limit"] or math.inf):
            smaller.append("limit")
        if not _files(before["data"]) <= _files(self.data):
            smaller.append("data")
        return [*FIXED, *smaller]

    @property
    def nucleus(self) -> float:
        """Effective value of `top_p`."""
        if self.top_p is not None:
            return self.top_p
        return 1.0 if self.engine == "local" else 0.9

    @property
    def client(self) -> LLMConfig:
        """The client's configuration: `llm` with the options that are set outside it."""
        return replace(
            self.llm,
            base_url=self.base_url,
            model=self.llm.model or self.model,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
        )


def _files(sources: str) -> set[Path]:
    return {Path(source.strip()).resolve() for source in sources.split(",")}


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compares two evaluations of the same items."""

    first: str
    """Output folder of an evaluation, or its results.json."""
    second: str
    """Output folder or results.json of the other evaluation; differences are second minus first."""
    output: str = "comparison"
    """Folder for compare.json and compare.html; one that holds another comparison is refused."""
    scoring: Scoring = "strict_cascade"
    """Scoring that decides which answers are right. Both count an empty answer as wrong here, so
    that every item can be compared."""
    seed: int = 0
    """Seed of the bootstrap."""
