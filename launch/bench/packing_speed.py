"""`verippo bench packing`: what happens to rollouts between sampling and the models' passes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...core.bounds import CountingInt, SeedInt, check_bounds
from ...core.text.data import Problem
from ...core.training.packing import PackedBatch, pack, share_out
from ...rl import ppo
from ...rl.rollout import Rollout, check_rollouts
from .measure import Machine, measure

VOCABULARY = 128_000
PACK_BYTES = 4 + 8 + 1
"""Bytes a token that packing must move: reads int32 ids, writes int64 ids and the mask."""
GAE_BYTES = 4 + 4 + 1 + 4 + 4
"""Reads rewards, values and mask, writes advantages and returns."""


@dataclass(frozen=True, kw_only=True)
class PackingBenchConfig:
    """Measures check, packing, balance and advantages of rollouts, on the CPU."""

    sizes: str = "128x1200,12800x1200,100000x1000"
    """Numbers of rollouts, each with the mean length of a rollout in tokens."""
    prompt_tokens: CountingInt = 200
    """Prompt tokens of each rollout, less than half of the mean length."""
    max_tokens_per_gpu: CountingInt = 16384
    """Maximum number of tokens in a micro-batch."""
    ranks: CountingInt = 8
    """Ranks that the rollouts are shared out to."""
    repeats: CountingInt = 3
    """Number of runs, after one that measures memory; the median is printed."""
    seed: SeedInt = 0
    """Seed of the random rollouts."""

    def __post_init__(self) -> None:
        check_bounds(self)
        for _, length in self.pairs():
            if not 2 * self.prompt_tokens < length <= self.max_tokens_per_gpu // 2:
                raise ValueError(
                    f"sizes has rollouts of {length} tokens: must be over twice "
                    f"prompt_tokens={self.prompt_tokens} and at most half of "
                    f"max_tokens_per_gpu={self.max_tokens_per_gpu}"
                )

    def pairs(self) -> list[tuple[int, int]]:
        """Numbers of rollouts with their mean lengths.

        Raises:
            ValueError: `sizes` is of another form.
        """
        parts = self.sizes.split(",")
        if not all(re.fullmatch(r"[1-9]\d*x[1-9]\d*", part) for part in parts):
            raise ValueError(f"sizes={self.sizes}: must be like 128x1200,12800x1200")
        pairs = [part.split("x") for part in parts]
        return [(int(num), int(length)) for num, length in pairs]


def bench(config: PackingBenchConfig, *, resolved: dict[str, Any]) -> None:
    """Runs the command `bench packing`."""
    machine = Machine()
    for num, length in config.pairs():
        rollouts = random_rollouts(num, length, config)
        measure_rollouts(machine, rollouts, config)


def random_rollouts(num: int, length: int, config: PackingBenchConfig) -> list[Rollout]:
    """Rollouts of random tokens, whose lengths are uniform from half to one and a half."""
    rng = np.random.default_rng(config.seed)
    problem = Problem(question="Question?", answer="answer", index=0)
    rollouts = []
    for total in rng.integers(length // 2, length * 3 // 2, num, endpoint=True):
        ids = rng.integers(0, VOCABULARY, total, dtype=np.int32)
        rollouts.append(
            Rollout(
                problem=problem,
                prompt_ids=ids[: config.prompt_tokens],
                response_ids=ids[config.prompt_tokens :],
                sampler_logprobs=-rng.random(total - config.prompt_tokens),
                text="",
            )
        )
    return rollouts


def measure_rollouts(
    machine: Machine,
    rollouts: list[Rollout],
    config: PackingBenchConfig,
) -> None:
    """Prints a figure for each thing that is done to the rollouts of a step."""
    batch = pack(rollouts)
    rewards = torch.randn(batch.num_tokens)
    values = torch.randn(batch.num_tokens)
    calls = {
        "check_rollouts": lambda: check_rollouts(rollouts, vocabulary=VOCABULARY, version=0),
        "pack": lambda: pack(rollouts),
        "share": lambda: share(batch, config),
        "gae": lambda: ppo.gae(
            rewards,
            values,
            batch.response_mask,
            batch.cu_seqlens,
            gamma=1.0,
            lam=0.95,
        ),
    }
    moved = {
        "check_rollouts": 4 * batch.num_tokens + 8 * batch.num_response_tokens,
        "pack": PACK_BYTES * batch.num_tokens,
        "share": 2 * 8 * batch.num_seqs,
        "gae": GAE_BYTES * batch.num_tokens,
    }
    for figure, call in calls.items():
        machine.print_cost(
            figure,
            measure(call, repeats=config.repeats),
            tokens=batch.num_tokens,
            moved_bytes=moved[figure],
            sequences=batch.num_seqs,
        )


def share(batch: PackedBatch, config: PackingBenchConfig) -> list[list[int]]:
    """The plan of the first rank's micro-batches, which each rank makes for itself."""
    return share_out(
        batch.lengths,
        max_tokens=config.max_tokens_per_gpu,
        rank=0,
        world_size=config.ranks,
    )
