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

from ..core.sampling.local_sampler import LocalSampler
from ..core.sampling.sampler import Prompt, Sampler, SamplingParams
from ..core.sampling.sglang_sampler import SglangConfig, SglangSampler
from ..core.training import dist
from ..core.training.metrics import environment
from ..core.training.model import context_length, load_causal_lm, load_tokenizer, stop_token_ids


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measures how fast responses are sampled, in this process and from servers."""

    model: str
    """Hugging Face folder or hub id; its weights are sent to the servers first."""
    sampler: SglangConfig = field(default_factory=SglangConfig)
    """the servers, and how the weights travel there"""
    prompts: int = 64
    """Responses per run."""
    prompt_tokens: int = 64
    """Tokens of each prompt."""
    max_new_tokens: int = 64
    """Tokens after which a response without stop token ends."""
    max_batch: int = 64
    """Responses decoded at once in this process."""
    repeats: int = 3
    """Runs of each engine after a warm-up run; the median speed is reported."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Data type of the model in this process; servers keep their own."""
    seed: int = 0
    """Seed of the prompts."""

    def __post_init__(self) -> None:
        for name in ("prompts", "prompt_tokens", "max_new_tokens", "max_batch", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


def bench(config: BenchConfig, *, resolved: dict[str, Any]) -> None:
    """The command `bench`. Raises ValueError for a model or servers that are not there."""
    model: Any = load_causal_lm(config.model, dtype=config.dtype)
    stops = stop_token_ids(config.model, load_tokenizer(config.model))
    facts = environment(1) | {
        "model": config.model,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    facts["load"] = os.getloadavg()[
        0
    ]  # of other programs too: a busy machine's figure is worth little
    words = random.Random(config.seed)
    rounds = [  # other prompts in each: servers keep what they computed for those they have seen
        [
            Prompt(
                token_ids=[
                    words.randrange(model.config.vocab_size) for _ in range(config.prompt_tokens)
                ],
                seed=number,
            )
            for number in range(config.prompts)
        ]
        for _ in range(config.repeats + 1)
    ]
    with tempfile.TemporaryDirectory() as folder:
        if config.sampler.urls:
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
                _print(
                    figure="weights",
                    engine="sglang",
                    sync=config.sampler.sync,
                    seconds=seconds,
                    **facts,
                )
                theirs = {
                    "sglang": info.get("version"),
                    "device": info.get("device"),
                    "servers": len(servers.fleet.servers),
                }
                _drawing("sglang", servers, rounds, config, facts | theirs)
            finally:
                servers.close()
    on_device = model.to(dist.device(), torch.bfloat16 if config.dtype == "bf16" else torch.float32)
    local = LocalSampler(on_device, stop_token_ids=stops, max_batch=config.max_batch)
    _drawing(
        "local",
        local,
        rounds,
        config,
        facts | {"dtype": config.dtype, "threads": torch.get_num_threads()},
    )


def _drawing(
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
