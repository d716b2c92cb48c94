"""Metrics of a step: means over tokens cover the response tokens of all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.training import dist
from ..core.training.engine import StepResult
from ..core.training.metrics import peak_memory_gib
from ..core.training.packing import PackedBatch
from . import ppo
from .config import VerifierConfig
from .rollout import Rollout
from .token_masks import as_float, check_mask, check_shapes
from .verifier import is_right


def step_metrics(
    *,
    rollouts: Sequence[Rollout],
    scores: Tensor,
    rewards: Tensor,
    batch: PackedBatch,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    entropy: Tensor,
    values: Tensor,
    returns: Tensor,
    right_score: float,
    needs_format: bool = True,
) -> dict[str, Any]:
    """Metrics of a step's rollouts and fixed targets, before the update.

    Args:
        rollouts: the step's rollouts.
        scores: [rollouts], the verifier's scores.
        rewards: [tokens], as are all tensors below.
        batch: the packed rollouts.
        logprobs: of the policy.
        ref_logprobs: of the reference.
        entropy: of the policy's distribution, in nats.
        values: of the critic.
        returns: targets of the critic.
        right_score: score from which a response counts as right.
        needs_format: whether the verifier counts a broken format as unparsable.
    """
    mask = batch.response_mask
    num = len(rollouts)
    sampled = torch.tensor([x for rollout in rollouts for x in rollout.sampler_logprobs])
    gap = (logprobs[mask] - sampled).abs()
    return _of_rollouts(rollouts, scores, right_score, needs_format, prefix="score_") | {
        "kl_mean": float((logprobs - ref_logprobs)[mask].sum()) / num,
        "reward_mean": float(rewards[mask].sum()) / num,
        "entropy": float(entropy[mask].mean()),
        "explained_variance": float(explained_variance(values, returns, mask)),
        "sampler_logprob_gap_mean": float(gap.mean()),
        "sampler_logprob_gap_p99": _percentile_99(gap),
        "tokens_generated": batch.num_response_tokens,
        "peak_memory_gib": peak_memory_gib(),
    }


def _percentile_99(x: Tensor) -> float:
    if len(x) < 2**24:  # the limit of quantile
        return float(x.quantile(0.99))
    return float(x.sort().values[-len(x) // 100])


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance that the critic explains.

        1 - Var(returns - values) / Var(returns)

    Args:
        values: [tokens].
        returns: [tokens].
        mask: [tokens], response tokens.

    Returns:
        Scalar: 1 for a perfect critic, 0 for a constant one or where the returns do not vary.

    Raises:
        ValueError: shapes disagree.
    """
    mask = check_mask(values, mask)
    check_shapes(values, returns=returns)
    value = as_float(values[mask])
    target = as_float(returns[mask])
    if len(target) < 2 or bool((target == target[0]).all()):
        return target.new_zeros(())
    return 1 - (target - value).var() / target.var()


def quarter_metrics(
    values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    batch: PackedBatch,
) -> dict[str, float]:
    """How the critic does along the responses, from their first quarter to their last.

    Args:
        values: [tokens], of the critic before the update.
        advantages: [tokens], before whitening.
        returns: [tokens], targets of the critic.
        batch: the packed rollouts.

    Returns:
        Mean value, mean advantage and explained variance of each quarter; NaN for an empty one.
    """
    mask = batch.response_mask
    lengths = batch.response_lengths
    before = mask.long().cumsum(0) - 1  # response tokens before this one, over all sequences
    position = before - (lengths.cumsum(0) - lengths)[batch.seq_ids]
    quarter = position * 4 // lengths.clamp(min=1)[batch.seq_ids]
    metrics: dict[str, float] = {}
    for number in range(4):
        part = mask & (quarter == number)
        name = f"q{number + 1}"
        metrics[f"value_mean_{name}"] = float(values[part].mean())
        metrics[f"advantage_mean_{name}"] = float(advantages[part].mean())
        metrics[f"explained_variance_{name}"] = float(explained_variance(values, returns, part))
    return metrics


def check_logprob_gap(metrics: dict[str, Any], limit: float, *, step: int) -> None:
    """Raises RuntimeError when the sampler's log-probs are too far from the trainer's."""
    gap = metrics["sampler_logprob_gap_mean"]
    if gap > limit:
        raise RuntimeError(
            f"step {step}: the sampler's log-probs are {gap:.3g} nats from the trainer's on "
            f"average, over max_logprob_gap={limit}: they do not hold the same weights"
        )


def evaluation_metrics(
    rollouts: Sequence[Rollout],
    scores: Tensor,
    right_score: float,
    *,
    needs_format: bool = True,
) -> dict[str, Any]:
    """Metrics of an evaluation: those of a step that need no forward pass of the trainer."""
    return (
        {"num": len(rollouts)}
        | _of_rollouts(rollouts, scores, right_score, needs_format, prefix="")
        | {"score_std": float(scores.std())}
    )


def _of_rollouts(
    rollouts: Sequence[Rollout],
    scores: Tensor,
    right_score: float,
    needs_format: bool,
    *,
    prefix: str,
) -> dict[str, Any]:
    num = len(rollouts)
    return {
        "score_mean": float(scores.mean()),
        f"{prefix}right_rate": float((scores >= right_score).double().mean()),
        f"{prefix}unparsable_rate": sum(needs_format and r.final is None for r in rollouts) / num,
        "exact_rate": sum(map(is_right, rollouts)) / num,
        "reasoned_rate": sum(r.reasoned for r in rollouts) / num,
        "response_length_mean": sum(r.num_trained for r in rollouts) / num,
        "context_length_mean": sum(r.num_context for r in rollouts) / num,
        "turns_mean": sum(r.num_turns for r in rollouts) / num,
        "truncated_rate": sum(r.truncated for r in rollouts) / num,
    }


def sample_row(
    rollout: Rollout,
    score: float,
    verifier: VerifierConfig,
    *,
    needs_format: bool = True,
    step: int,
    split: str,
) -> dict[str, Any]:
    """A row of samples.jsonl: a sampled text with its score and verdict.

    `needs_format`: whether the verifier counts a broken format as unparsable.
    """
    verdict = "right" if score >= verifier.right else "wrong"
    if needs_format and rollout.final is None:
        verdict = "unparsable"
    if math.isnan(score):
        verdict = "unjudged"
    return {
        "step": step,
        "split": split,
        "prompt": rollout.problem.question,
        "response": rollout.text,
        "answer": rollout.problem.answer,
        "score": None if math.isnan(score) else round(score, 6),
        "verdict": verdict,
    }


class UpdateMeter:
    """Sums over the micro-batches of a step's update, averaged over all tokens of all ranks."""

    def __init__(self) -> None:
        self.policy_sums = torch.zeros(6, dtype=torch.float64, device=dist.device())
        self.critic_sums = torch.zeros(2, dtype=torch.float64, device=dist.device())
        self.first_gap = torch.zeros(1, device=dist.device())
        self.policy_results: list[StepResult] = []
        self.critic_results: list[StepResult] = []
        self.policy_rate = 0.0
        """Learning rate of the policy at its last optimizer step."""
        self.critic_rate = 0.0
        self._seen = torch.zeros(6, dtype=torch.float64)

    def add_policy(self, pg: ppo.PolicyLoss, *, first_minibatch: bool) -> None:
        """Adds a micro-batch's loss; `first_minibatch`: the policy has not moved yet."""
        parts = (
            pg.loss_sum,
            pg.clip_sum,
            pg.dual_clip_sum,
            pg.masked_sum.to(pg.loss_sum.device),
            pg.approx_kl_sum,
            pg.num_tokens,
        )
        self.policy_sums += torch.stack([part.detach().double() for part in parts])
        if first_minibatch:
            self.first_gap = torch.maximum(self.first_gap, pg.ratio_max_abs_log)

    def add_critic(self, vf: ppo.ValueLoss) -> None:
        """Adds a micro-batch's loss."""
        parts = (vf.loss_sum, vf.num_tokens)
        self.critic_sums += torch.stack([part.detach().double() for part in parts])

    def take_approx_kl(self) -> float:
        """Mean of `approx_kl` since the last call, over all ranks."""
        sums = dist.all_sum(self.policy_sums.clone()).cpu()
        kl, num_tokens = (sums - self._seen)[-2:].tolist()
        self._seen = sums
        return kl / max(num_tokens, 1)

    def result(self) -> dict[str, float]:
        """The metrics of the update; NaN for those of a model that was not trained.

        `ratio_first_minibatch_max` is the largest |log rho| before the first optimizer step: 0
        but for rounding. Gradient norms are means over the applied steps, before clipping.
        """
        loss, clip, dual_clip, masked, kl, num = dist.all_sum(self.policy_sums).tolist()
        value_loss, num_values = dist.all_sum(self.critic_sums).tolist()
        return {
            "policy_loss": _ratio(loss, num),
            "clip_fraction": _ratio(clip, num),
            "dual_clip_fraction": _ratio(dual_clip, num),
            "ratio_masked_fraction": _ratio(masked, num),
            "approx_kl": _ratio(kl, num),
            "value_loss": _ratio(value_loss, num_values),
            "ratio_first_minibatch_max": float(dist.all_max(self.first_gap)),
            "grad_norm_policy": _mean_norm(self.policy_results),
            "grad_norm_value": _mean_norm(self.critic_results),
        }


def _ratio(total: float, num: float) -> float:
    return total / num if num else math.nan


def _mean_norm(results: list[StepResult]) -> float:
    norms = [result.grad_norm for result in results if result.applied]
    return _ratio(sum(norms), len(norms))
