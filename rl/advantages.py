"""Where advantages come from, chosen once before the loop: a critic and GAE, or the other samples of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.training.engine import StepResult
from ..core.training.packing import PackedBatch
from . import ppo
from .config import PPOConfig
from .rollout import Rollout

AdvantageFunction = Callable[
    [Tensor, Tensor, PackedBatch, Sequence[Rollout]], tuple[Tensor, Tensor]
]
"""(rewards [tokens], values [tokens], batch, rollouts) -> (advantages, returns) [tokens] each, 0 off the mask"""


def advantage_function(config: PPOConfig) -> AdvantageFunction:
    if config.advantage == "gae":
        return partial(_with_critic, gamma=config.gamma, lam=config.lam)
    return partial(_within_groups, kind=config.advantage, alone=config.samples_per_prompt == 1)


def _with_critic(
    rewards: Tensor,
    values: Tensor,
    batch: PackedBatch,
    rollouts: Sequence[Rollout],
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    return ppo.gae(rewards, values, batch.response_mask, batch.cu_seqlens, gamma=gamma, lam=lam)


def _within_groups(
    rewards: Tensor,
    values: Tensor,
    batch: PackedBatch,
    rollouts: Sequence[Rollout],
    *,
    kind: str,
    alone: bool,
) -> tuple[Tensor, Tensor]:
    """Every token of a response gets its response's advantage; a response's reward is its tokens' sum, KL included.

    alone: one sample a prompt, each a group by itself, even where a step meets a problem twice."""
    totals = torch.zeros(batch.num_seqs, dtype=rewards.dtype).index_add(0, batch.seq_ids, rewards)
    groups = torch.tensor(
        [number if alone else rollout.problem.index for number, rollout in enumerate(rollouts)]
    )
    advantages = ppo.group_advantages(totals, groups, kind=kind)[batch.seq_ids]
    return torch.where(batch.response_mask, advantages, 0.0), torch.zeros_like(rewards)


class NoCritic:
    """In the critic's place when advantages need none: values of zero, and nothing to train."""

    def __call__(self, batch: PackedBatch) -> Tensor:
        return torch.zeros_like(batch.tokens, dtype=torch.float32)

    def backward(self, loss_sum: Tensor, num_tokens: int, *, last: bool) -> None:
        """Nothing."""

    def step(self, learning_rate: float) -> StepResult:
        return StepResult(applied=True, grad_norm=0.0)

    def save(self, folder: Path, name: str) -> None:
        """Nothing."""

    load: Any = save
