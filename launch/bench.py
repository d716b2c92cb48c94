"""`verippo bench`: how fast responses are drawn, in this process and from servers, one JSON object a line."""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..core.bounds import CountingInt, check_bounds
from ..core.sampling.local_sampler import LocalSampler
from ..core.sampling.sampler import Prompt, Sampler, SamplingParams
from ..core.sampling.sglang_sampler import SglangConfig, SglangSampler
from ..core.training import dist
from ..core.training.metrics import environment
from ..core.training.pretrained import (
    context_length,
    load_causal_lm,
    load_tokenizer,
    stop_token_ids,
)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measures how fast responses are sampled, in this process and from servers."""

    model: str
    """Hugging Face folder or hub id; its weights are sent to the servers first."""
    sampler: SglangConfig = field(default_factory=SglangConfig)
    """the servers, and how the weights travel there"""
    prompts: CountingInt = 64
    """Responses per run."""
    prompt_tokens: CountingInt = 64
    """Tokens of each prompt."""
    max_new_tokens: CountingInt = 64
    """Tokens after which a response without stop token ends."""
    max_batch: CountingInt = 64
    """Responses decoded at once in this process."""
    repeats: CountingInt = 3
    """Runs of each engine after a warm-up run; the median speed is reported."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Data type of the model in this process; servers keep their own."""
    seed: int = 0
    """Seed of the prompts."""

    def __post_init__(self) -> None:
        check_bounds(self)


def bench(config: BenchConfig, *, resolved: dict[str, Any]) -> None:
    """The command `bench`.

    Raises:
        ValueError: the model cannot be loaded, or a server does not answer.
    """
    model: Any = load_causal_lm(config.model, dtype=config.dtype)
    stops = stop_token_ids(config.model, load_tokenizer(config.model))
    facts = environment(1)
    facts["model"] = config.model
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    facts["load"] = os.getloadavg()[0]  # figures from a busy machine are worth little
    rounds = _rounds(config, model.config.vocab_size)
    if config.sampler.urls:
        _bench_servers(config, model, stops, rounds, facts)
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    local = LocalSampler(
        model.to(dist.device(), dtype), stop_token_ids=stops, max_batch=config.max_batch
    )
    facts |= {"dtype": config.dtype, "threads": torch.get_num_threads()}
    _bench_sampler("local", local, rounds, config, facts)


def _rounds(config: BenchConfig, vocabulary: int) -> list[list[Prompt]]:
    """Random prompts of each run; all differ, since servers cache the prompts they have seen."""
    words = random.Random(config.seed)

    def prompt(number: int) -> Prompt:
        ids = [words.randrange(vocabulary) for _ in range(config.prompt_tokens)]
        return Prompt(token_ids=ids, seed=number)

    return [[prompt(n) for n in range(config.prompts)] for _ in range(config.repeats + 1)]


def _bench_servers(
    config: BenchConfig,
    model: Any,
    stops: tuple[int, ...],
    rounds: list[list[Prompt]],
    facts: dict[str, Any],
) -> None:
    """Sends the weights to the servers and samples from them."""
    with tempfile.TemporaryDirectory() as folder:
        servers = SglangSampler(
            config.sampler,
            stop_token_ids=stops,
            vocabulary=model.config.vocab_size,
            context=context_length(model.config),
            folder=Path(folder),
        )
        try:
            info = servers.fleet.servers[0].info()
            start = time.perf_counter()
            servers.update_weights(model.named_parameters(), 1)
            seconds = time.perf_counter() - start
            sync = config.sampler.sync
            _print(figure="weights", engine="sglang", sync=sync, seconds=seconds, **facts)
            facts = facts | {"sglang": info.get("version"), "device": info.get("device")}
            facts["servers"] = len(servers.fleet.servers)
            _bench_sampler("sglang", servers, rounds, config, facts)
        finally:
            servers.close()


def _bench_sampler(
    engine: str,
    sampler: Sampler,
    rounds: list[list[Prompt]],
    config: BenchConfig,
    facts: dict[str, Any],
) -> None:
    params = SamplingParams(max_new_tokens=config.max_new_tokens)
    runs = []
    for prompts in rounds:
        start = time.perf_counter()
        tokens = sum(len(completion.token_ids) for completion in sampler.generate(prompts, params))
        runs.append((tokens, time.perf_counter() - start))
    counted = runs[1:]
    _print(
        figure="sampler",
        engine=engine,
        tokens_per_second=statistics.median(tokens / seconds for tokens, seconds in counted),
        seconds=[round(seconds, 3) for _, seconds in counted],
        tokens=[tokens for tokens, _ in counted],
        prompts=config.prompts,
        prompt_tokens=config.prompt_tokens,
        max_new_tokens=config.max_new_tokens,
        **facts,
    )


def _print(**row: Any) -> None:
    rounded = {
        key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()
    }
    print(json.dumps(rounded), flush=True)
