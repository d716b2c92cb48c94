"""Advantage estimators and policy losses, chosen once before the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..core.training.engine import StepResult
from ..core.training.packing import PackedBatch
from . import ppo
from .config import PPOConfig
from .corrections import adaptive_lambda, sampler_correction
from .experience import MicroBatch
from .hooks import describe, load_function
from .rollout import Rollout

AdvantageFunction = Callable[
    [Tensor, Tensor, PackedBatch, Sequence[Rollout]], tuple[Tensor, Tensor]
]
"""(rewards, values, batch, rollouts) -> (advantages, returns): [tokens] each, 0 off the mask."""

PolicyLossFunction = Callable[[Tensor, MicroBatch], ppo.PolicyLoss]
"""(log-probs [tokens] of the policy being trained, the micro-batch) -> loss to minimise."""


def advantage_function(config: PPOConfig) -> AdvantageFunction:
    """The advantage estimator that a configuration names."""
    if config.advantage_function:
        function = load_function(config.advantage_function, option="advantage_function")
        return partial(_checked, function, config.advantage_function)
    if config.advantage == "gae":
        return partial(_from_critic, config=config)
    alone = config.samples_per_prompt == 1
    return partial(_from_groups, kind=config.advantage, alone=alone)


def policy_loss_function(config: PPOConfig) -> PolicyLossFunction:
    """The policy loss that a configuration names."""
    if config.policy_loss_function:
        function = load_function(config.policy_loss_function, option="policy_loss_function")
        return partial(_checked_loss, function, config.policy_loss_function)
    return partial(_clipped_loss, config=config)


def importance_weights(
    config: PPOConfig,
    logprobs: Tensor,
    batch: PackedBatch,
    rollouts: Sequence[Rollout],
) -> Tensor | None:
    """[tokens] weights for the difference between sampler and trainer; None without correction."""
    if config.importance_cap is None:
        return None
    sampled = torch.zeros_like(logprobs)
    sampled[batch.response_mask] = torch.tensor(
        [logprob for rollout in rollouts for logprob in rollout.sampler_logprobs],
        dtype=logprobs.dtype,
    )
    return sampler_correction(
        logprobs,
        sampled,
        batch.response_mask,
        batch.cu_seqlens,
        level="token",
        mode="truncate",
        low=0.0,
        high=config.importance_cap,
    ).weights


def _clipped_loss(logprobs: Tensor, micro: MicroBatch, *, config: PPOConfig) -> ppo.PolicyLoss:
    return ppo.policy_loss(
        logprobs,
        micro.logprobs,
        micro.advantages,
        micro.mask,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        importance=micro.importance,
    )


def _checked(
    function: AdvantageFunction,
    name: str,
    rewards: Tensor,
    values: Tensor,
    batch: PackedBatch,
    rollouts: Sequence[Rollout],
) -> tuple[Tensor, Tensor]:
    """Calls a user's estimator and checks its result."""
    name = f"advantage_function={name}"
    result = function(rewards, values, batch, rollouts)
    if not (isinstance(result, tuple) and len(result) == 2):
        raise ValueError(
            f"{name} returned {describe(result)}: must be a tuple (advantages, returns)"
        )
    for part, tensor in zip(("advantages", "returns"), result, strict=True):
        is_tensor = isinstance(tensor, Tensor) and tensor.is_floating_point()
        if not is_tensor or tensor.shape != rewards.shape:
            raise ValueError(
                f"{name} returned {describe(tensor)} as {part}: must be a Tensor of floats of "
                f"shape [{len(rewards)}], one per token"
            )
        if not bool(tensor[batch.response_mask].isfinite().all()):
            raise ValueError(f"{name}: {part} hold a value that is not finite")
    return result


def _checked_loss(
    function: PolicyLossFunction, name: str, logprobs: Tensor, micro: MicroBatch
) -> ppo.PolicyLoss:
    """Calls a user's policy loss and checks its result."""
    name = f"policy_loss_function={name}"
    result = function(logprobs, micro)
    if not isinstance(result, ppo.PolicyLoss):
        raise ValueError(f"{name} returned {describe(result)}: must be a PolicyLoss")
    for part, value in result._asdict().items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(
                f"{name} returned {describe(value)} as {part}: must be a Tensor of one number"
            )
    if logprobs.requires_grad and not result.loss_sum.requires_grad:
        raise ValueError(
            f"{name} returned a loss_sum without gradient: compute it from the log-probs, "
            "not from a copy"
        )
    return result


def _from_critic(
    rewards: Tensor,
    values: Tensor,
    batch: PackedBatch,
    rollouts: Sequence[Rollout],
    *,
    config: PPOConfig,
) -> tuple[Tensor, Tensor]:
    lam: float | Tensor = config.lam
    if config.lam_alpha is not None:
        lengths = torch.tensor([len(rollout.response_ids) for rollout in rollouts])
        lam = adaptive_lambda(lengths, alpha=config.lam_alpha)
    mask = batch.response_mask
    return ppo.gae(rewards, values, mask, batch.cu_seqlens, gamma=config.gamma, lam=lam)


def _from_groups(
    rewards: Tensor,
    values: Tensor,
    batch: PackedBatch,
    rollouts: Sequence[Rollout],
    *,
    kind: str,
    alone: bool,
) -> tuple[Tensor, Tensor]:
    """Gives every token its response's advantage; a response's reward is the sum over its tokens.

    `alone`: with one sample per prompt each response is a group of its own, even where a step
    contains the same problem twice.
    """
    totals = torch.zeros(batch.num_seqs, dtype=rewards.dtype)
    totals = totals.index_add(0, batch.seq_ids, rewards)
    if alone:
        groups = torch.arange(len(rollouts))
    else:
        groups = torch.tensor([rollout.problem.index for rollout in rollouts])
    advantages = ppo.group_advantages(totals, groups, kind=kind)[batch.seq_ids]
    return torch.where(batch.response_mask, advantages, 0.0), torch.zeros_like(rewards)


class NoCritic:
    """Stands in for the critic when advantages need none: values of zero, nothing to train."""

    def __call__(self, batch: PackedBatch) -> Tensor:
        return torch.zeros_like(batch.tokens, dtype=torch.float32)

    def backward(
        self,
        loss_sum: Tensor,
        num_tokens: int,
        *,
        last: bool,
    ) -> None:
        """Does nothing."""

    def step(self, learning_rate: float) -> StepResult:
        return StepResult(applied=True, grad_norm=0.0)

    def save(self, folder: Path, name: str) -> None:
        """Does nothing."""

    def load(self, folder: Path, name: str) -> None:
        """Does nothing."""
