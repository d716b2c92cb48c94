"""What the evaluation and the comparison of two of them can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from ..core.llm.client import LLMConfig
from ..core.sampling.server import ServerConfig
from ..core.training.engine import Dtype

PromptKind = Literal["free", "strict", "thinking"]
Scoring = Literal["strict_cascade", "original"]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Multiple-choice accuracy of a model. The defaults are the published evaluation's."""

    data: str
    """comma-separated files in the evaluation format: {"source": [{question, options, answer_idx, answer}, ...]}"""
    output: str
    """folder for results.json, answers.jsonl, report.html and the journal"""
    model: str = ""
    """Hugging Face folder or hub id: brings the weights (engines local, serve) and the chat template (completions); else
    the name that the server knows it by"""

    engine: Literal["openai", "local", "serve"] = "openai"
    """openai: a running sglang or other OpenAI-compatible server; serve: an sglang server of our own for the time of the
    run; local: in this process, for small models"""
    base_url: str | None = None
    """of the running server, as http://127.0.0.1:30000/v1"""
    endpoint: Literal["completions", "chat"] = "completions"
    """completions: the chat template of `model` is applied here; chat: by the server"""
    prompt: PromptKind = "strict"
    """free: only the question; strict: asks for "The answer is A."; thinking: asks for `## Thinking`, `## Final Response` too"""
    system_prompt: str | None = None
    """a system turn before every question"""
    runs: int = 1
    """answers drawn for every item"""
    permutations: int = 0
    """further orders of the options, drawn by seed, in which every item is asked too: shows a bias to positions"""
    temperature: float = 0.5
    """logits are divided by it; 0 takes the likeliest token"""
    top_p: float | None = None
    """nucleus of the distribution that is drawn from; left out: 0.9 with a server, 1 with the local engine, which has no other"""
    max_new_tokens: int = 2000
    """an answer that reaches it is cut, and counted as truncated"""

    scoring: Scoring = "strict_cascade"
    """the rule whose accuracy leads; the other's stands beside it. original: as published numbers were scored"""
    skip_bad: bool = False
    """leave malformed items out, name and count them, instead of refusing the file"""
    limit: int | None = None
    """only the first items of each source"""
    seed: int = 0
    """of every draw, together with (item, run, permutation)"""
    resume: Literal["auto", "never"] = "auto"
    """auto: what the journal in `output` holds is not asked again; never: refuse a folder that has one"""
    retry_failed: bool = False
    """ask again for the items that failed for good in an earlier run"""

    dtype: Dtype = "bf16"
    """of the weights (local engine)"""
    max_batch: int = 64
    """answers decoded at once (local engine)"""
    server: ServerConfig = field(default_factory=ServerConfig)
    """of our own server (engine serve); its model is the one above"""
    llm: LLMConfig = field(default_factory=LLMConfig)
    """of the client: concurrency, retries, timeouts, keys, budget. Its base_url, temperature and max_new_tokens are set above"""

    def __post_init__(self) -> None:
        for name, least in (
            ("runs", 1),
            ("permutations", 0),
            ("max_new_tokens", 1),
            ("max_batch", 1),
            ("limit", 1),
        ):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: must be 0 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must lie in (0, 1]")
        if self.temperature == 0 and self.runs > 1:
            raise ValueError(
                f"runs={self.runs} at temperature=0 draws one answer {self.runs} times: raise it, or runs=1"
            )
        for name in ("base_url", "temperature", "max_new_tokens"):
            if getattr(self.llm, name) != getattr(LLMConfig(), name):
                raise ValueError(f"llm.{name}={getattr(self.llm, name)}: give --{name} itself")
        self._check_engine()

    def _check_engine(self) -> None:
        served_chat = self.engine == "openai" and self.endpoint == "chat"
        if not self.model and not (served_chat and self.llm.model):
            raise ValueError(
                "model is missing: give --model a folder or hub id (with --endpoint chat, --llm.model will do)"
            )
        if self.engine == "openai" and self.endpoint == "completions" and not self.base_url:
            raise ValueError("engine openai needs the server: give --base_url http://HOST:PORT/v1")
        if self.engine != "openai" and self.base_url:
            raise ValueError(
                f"engine {self.engine} asks no running server: drop --base_url, or say --engine openai"
            )
        if self.server.model:
            raise ValueError(f"server.model={self.server.model}: give --model itself")
        if self.engine == "local" and self.endpoint == "chat":
            raise ValueError("engine local has no endpoint chat: drop --endpoint")
        if self.engine == "local" and self.top_p not in (None, 1.0):
            raise ValueError(
                f"top_p={self.top_p}: the local engine draws from the whole distribution: drop it, or use a server"
            )

    @property
    def nucleus(self) -> float:
        """top_p as it is used."""
        return self.top_p if self.top_p is not None else 1.0 if self.engine == "local" else 0.9

    @property
    def client(self) -> LLMConfig:
        """The client's configuration, with the fields that are given once, above."""
        return replace(
            self.llm,
            base_url=self.base_url,
            model=self.llm.model or self.model,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Two evaluations of the same items, item by item."""

    first: str
    """output folder of an evaluation, or its results.json"""
    second: str
    """the other one: differences are second less first"""
    output: str = "comparison"
    """folder for compare.json and compare.html"""
    scoring: Scoring = "strict_cascade"
    """the rule by which items are right; empty answers count as wrong by either, or the items would not pair"""
    seed: int = 0
    """of the bootstrap"""
