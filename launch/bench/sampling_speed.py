"""`verippo bench sampler`: sampling speed in this process and on servers."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ...core.bounds import CountingInt, SeedInt, check_bounds
from ...core.sampling.local_sampler import LocalSampler, check_sampling
from ...core.sampling.sampler import Prompt, Sampler, SamplingParams
from ...core.sampling.sglang_sampler import SglangConfig, SglangSampler
from ...core.text.stop_tokens import stop_token_ids
from ...core.training import dist
from ...core.training.metrics import environment
from ...core.training.pretrained import context_length, load_causal_lm, load_tokenizer
from .measure import load, print_row


@dataclass(frozen=True, kw_only=True)
class SamplerBenchConfig:
    """Measures how fast responses to random prompts are sampled here and on running servers."""

    model: str
    """Model to measure: a Hugging Face folder or hub id; servers receive its weights first."""
    sampler: SglangConfig = field(default_factory=SglangConfig)
    prompts: CountingInt = 64
    """Number of responses in a run."""
    prompt_tokens: CountingInt = 64
    """Length of each prompt in tokens."""
    max_new_tokens: CountingInt = 64
    """Length in tokens at which a response is cut."""
    max_batch: CountingInt = 64
    """Responses decoded at once in this process."""
    repeats: CountingInt = 3
    """Number of runs of each engine, after one that is not counted; the median is printed."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Data type of the model in this process; servers keep their own."""
    seed: SeedInt = 0
    """Seed of the random prompts."""

    def __post_init__(self) -> None:
        check_bounds(self)


def bench(config: SamplerBenchConfig, *, resolved: dict[str, Any]) -> None:
    """Runs the command `bench sampler`.

    Raises:
        ValueError: The model cannot be loaded, or no server answers.
    """
    model: Any = load_causal_lm(config.model, dtype=config.dtype)
    check_sampling(model.config, config.model)
    stops = stop_token_ids(config.model, load_tokenizer(config.model))
    facts = {
        **environment(1),
        **load(),
        "model": config.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompts": config.prompts,
        "prompt_tokens": config.prompt_tokens,
        "max_new_tokens": config.max_new_tokens,
    }
    rng = random.Random(config.seed)
    vocabulary = range(model.config.vocab_size)
    rounds = [  # of different prompts, because servers cache what they computed for known ones
        [
            Prompt(token_ids=rng.choices(vocabulary, k=config.prompt_tokens), seed=seed)
            for seed in range(config.prompts)
        ]
        for _ in range(config.repeats + 1)
    ]
    if config.sampler.urls:
        measure_servers(config.sampler, model, stops, rounds, facts)
    local = LocalSampler(model.to(dist.device()), stop_token_ids=stops, max_batch=config.max_batch)
    own = {"engine": "local", "dtype": config.dtype, "threads": torch.get_num_threads()}
    measure_sampling(local, rounds, facts | own)


def measure_servers(
    config: SglangConfig,
    model: Any,
    stops: tuple[int, ...],
    rounds: list[list[Prompt]],
    facts: dict[str, Any],
) -> None:
    """Prints the time of a weight update and the sampling speed of the servers."""
    with tempfile.TemporaryDirectory() as folder:
        sampler = SglangSampler(
            config,
            stop_token_ids=stops,
            vocabulary=model.config.vocab_size,
            context=context_length(model.config),
            folder=Path(folder),
        )
        with closing(sampler):
            servers = sampler.fleet.servers
            info = servers[0].info()
            facts = facts | {
                "engine": "sglang",
                "sglang": info.get("version"),
                "device": info.get("device"),
                "servers": len(servers),
            }
            start = time.perf_counter()
            sampler.update_weights(model.named_parameters(), 1)
            seconds = round(time.perf_counter() - start, 3)
            print_row({"figure": "weights", "sync": config.sync, "seconds": seconds} | facts)
            measure_sampling(sampler, rounds, facts)


def measure_sampling(sampler: Sampler, rounds: list[list[Prompt]], facts: dict[str, Any]) -> None:
    """Prints the median speed of the runs, without the first."""
    params = SamplingParams(max_new_tokens=facts["max_new_tokens"])
    runs = []
    for prompts in rounds:
        start = time.perf_counter()
        completions = sampler.generate(prompts, params)
        seconds = time.perf_counter() - start
        runs.append((sum(len(completion.token_ids) for completion in completions), seconds))
    counted = runs[1:]
    speed = statistics.median(tokens / seconds for tokens, seconds in counted)
    figures = {
        "figure": "sampler",
        "tokens_per_second": round(speed, 3),
        "seconds": [round(seconds, 3) for _, seconds in counted],
        "tokens": [tokens for tokens, _ in counted],
    }
    print_row(figures | facts)
