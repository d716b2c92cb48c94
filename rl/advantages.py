"""Advantage estimators and policy losses, chosen once before the loop."""

from __future__ import annotations

import math
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
from .corrections import adaptive_lambda, sampler_correction
from .experience import MicroBatch, MiniBatch
from .hooks import describe, load_function
from .policy_losses import SequenceLoss, TokenLoss
from .rollout import Rollout

AdvantageFunction = Callable[
    [Tensor, Tensor, PackedBatch, Sequence[Rollout]], tuple[Tensor, Tensor]
]
"""(rewards, values, batch, rollouts) -> (advantages, returns): [tokens] each, 0 off the mask."""

PolicyLossFunction = Callable[[Any, MicroBatch], ppo.PolicyLoss]
"""(log-probs [tokens] of the policy being trained, the micro-batch) -> loss to minimise.

With `entropy_coef`, the first argument is a pair: log-probs and entropies, [tokens] each.
"""


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
        loss = partial(_checked_loss, function, config.policy_loss_function)
    else:
        losses = {"ppo": _ppo_loss, "gspo": _gspo_loss, "cispo": _cispo_loss}
        loss = partial(losses[config.policy_loss], config=config)
    if config.kl.place == "loss":
        loss = partial(_with_kl, loss)
    if config.ratio_mask_low > 0 or config.ratio_mask_high is not None:
        loss = partial(_with_ratio_mask, loss, config)
    if config.entropy_coef > 0:
        loss = partial(_with_entropy, loss, config)
    return loss


def length_penalties(config: PPOConfig, rollouts: Sequence[Rollout]) -> Tensor:
    """[rollouts], 0 or less: for truncated responses, and for those close to the limit."""
    truncated = torch.tensor([float(rollout.truncated) for rollout in rollouts])
    penalties = -config.missing_eos_penalty * truncated
    if config.overlong_buffer:
        lengths = torch.tensor([rollout.num_trained for rollout in rollouts])
        limit = config.sampling.max_new_tokens
        penalties = penalties + ppo.overlong_penalty(
            lengths, limit=limit, buffer=config.overlong_buffer
        )
    return penalties


def loss_weights(
    config: PPOConfig,
    logprobs: Tensor,
    batch: PackedBatch,
    rollouts: Sequence[Rollout],
) -> tuple[Tensor, dict[str, float]]:
    """Weights of the tokens in the policy loss, with metrics of the correction.

    They correct for a sampler that differs from the trainer, and divide by a sequence's length
    where the loss is a mean over sequences. Every loss is linear in the advantages, which they
    multiply.

    Returns:
        [tokens], 0 off the mask.
    """
    mask = batch.response_mask
    weights = mask.to(logprobs.dtype)
    metrics: dict[str, float] = {}
    if config.correction.level != "none":
        sampled = torch.zeros_like(logprobs)
        sampled[mask] = torch.tensor(
            [logprob for rollout in rollouts for logprob in rollout.sampler_logprobs],
            dtype=logprobs.dtype,
        )
        correction = sampler_correction(
            logprobs,
            sampled,
            mask,
            batch.cu_seqlens,
            level=config.correction.level,
            mode=config.correction.mode,
            low=config.correction.low,
            high=config.correction.high,
        )
        weights = correction.weights
        metrics = {
            "correction_touched_rate": float(correction.num_touched / mask.sum()),
            "correction_sample_size": float(correction.effective_sample_size),
        }
    if config.mean_over == "sequence" and config.policy_loss != "gspo":
        weights = weights / batch.response_lengths.clamp(min=1)[batch.seq_ids]
    return weights, metrics


def loss_divisor(config: PPOConfig, mini: MiniBatch) -> int:
    """Number by which the policy loss of a mini-batch, a sum, is divided."""
    if config.mean_over == "token":
        return mini.num_response_tokens
    if config.mean_over == "sequence":
        return len(mini.seqs)
    return len(mini.seqs) * config.sampling.max_new_tokens


def _ppo_loss(logprobs: Tensor, micro: MicroBatch, *, config: PPOConfig) -> ppo.PolicyLoss:
    return ppo.policy_loss(
        logprobs,
        micro.logprobs,
        micro.advantages,
        micro.mask,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )


def _gspo_loss(logprobs: Tensor, micro: MicroBatch, *, config: PPOConfig) -> ppo.PolicyLoss:
    loss = ppo.gspo_loss(
        logprobs,
        micro.logprobs,
        micro.advantages,
        micro.mask,
        micro.batch.cu_seqlens,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
    )
    return _as_policy_loss(loss)


def _cispo_loss(logprobs: Tensor, micro: MicroBatch, *, config: PPOConfig) -> ppo.PolicyLoss:
    loss = ppo.cispo_loss(
        logprobs,
        micro.logprobs,
        micro.advantages,
        micro.mask,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
    )
    return _as_policy_loss(loss)


def _as_policy_loss(loss: SequenceLoss | TokenLoss) -> ppo.PolicyLoss:
    return ppo.PolicyLoss(
        loss_sum=loss.loss_sum,
        num_tokens=loss.num_tokens,
        clip_sum=loss.clip_sum,
        dual_clip_sum=torch.zeros_like(loss.clip_sum),
        approx_kl_sum=loss.approx_kl_sum,
        ratio_max_abs_log=loss.ratio_max_abs_log,
    )


def _with_kl(loss: PolicyLossFunction, logprobs: Tensor, micro: MicroBatch) -> ppo.PolicyLoss:
    """A policy loss with the KL divergence from the reference added to it."""
    result = loss(logprobs, micro)
    kl = ppo.kl_loss(logprobs, micro.logprobs, micro.ref_logprobs, micro.mask)
    return result._replace(loss_sum=result.loss_sum + micro.kl_coef * kl.loss_sum)


def _with_ratio_mask(
    loss: PolicyLossFunction,
    config: PPOConfig,
    logprobs: Tensor,
    micro: MicroBatch,
) -> ppo.PolicyLoss:
    """A policy loss to which tokens out of bounds give their value, but no gradient."""
    masked = ppo.ratio_mask(
        logprobs,
        micro.logprobs,
        micro.mask,
        low=config.ratio_mask_low,
        high=math.inf if config.ratio_mask_high is None else config.ratio_mask_high,
    )
    held = torch.where(masked.outside, logprobs.detach(), logprobs)
    return loss(held, micro)._replace(masked_sum=masked.num_outside)


def _with_entropy(
    loss: PolicyLossFunction,
    config: PPOConfig,
    outputs: tuple[Tensor, Tensor],
    micro: MicroBatch,
) -> ppo.PolicyLoss:
    """A policy loss less the entropy bonus."""
    logprobs, entropy = outputs
    result = loss(logprobs, micro)
    bonus = ppo.entropy_loss(entropy, micro.mask)
    return result._replace(loss_sum=result.loss_sum + config.entropy_coef * bonus.loss_sum)


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
        lam = adaptive_lambda(batch.response_lengths, alpha=config.lam_alpha)
    return ppo.gae(
        rewards,
        values,
        batch.response_mask,
        batch.cu_seqlens,
        gamma=config.gamma,
        lam=lam,
        lam_critic=config.lam_critic,
    )


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
