"""A step's metrics: token-weighted over the mask, over all ranks."""

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
) -> dict[str, Any]:
    """Of the rollouts and the fixed targets, which every rank holds in full: [rollouts] or [tokens] each."""
    mask, num = batch.response_mask, len(rollouts)
    sampled = torch.tensor(
        [logprob for rollout in rollouts for logprob in rollout.sampler_logprobs]
    )
    gap = (logprobs[mask] - sampled).abs()
    return _of_rollouts(rollouts, scores, right_score, prefix="score_") | {
        "kl_mean": float((logprobs - ref_logprobs)[mask].sum()) / num,
        "reward_mean": float(rewards[mask].sum()) / num,
        "entropy": float(entropy[mask].mean()),
        "explained_variance": float(explained_variance(values, returns, mask)),
        "sampler_logprob_gap_mean": float(gap.mean()),
        "sampler_logprob_gap_p99": float(gap.quantile(0.99))
        if len(gap) < 2**24
        else float(gap.sort().values[-len(gap) // 100]),
        "tokens_generated": batch.num_response_tokens,
        "peak_memory_gib": peak_memory_gib(),
    }


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


def check_logprob_gap(metrics: dict[str, Any], limit: float, *, step: int) -> None:
    """Raises RuntimeError when the sampler's log-probs are too far from the trainer's."""
    gap = metrics["sampler_logprob_gap_mean"]
    if gap > limit:
        raise RuntimeError(
            f"step {step}: the sampler's log-probs are {gap:.3g} nats from the trainer's on "
            f"average, over max_logprob_gap={limit}: they do not hold the same weights"
        )


def evaluation_metrics(
    rollouts: Sequence[Rollout], scores: Tensor, right_score: float
) -> dict[str, Any]:
    """Of an evaluation: as a step's, without what needs a training forward."""
    return (
        {"num": len(rollouts)}
        | _of_rollouts(rollouts, scores, right_score, prefix="")
        | {"score_std": float(scores.std())}
    )


def _of_rollouts(
    rollouts: Sequence[Rollout], scores: Tensor, right_score: float, *, prefix: str
) -> dict[str, Any]:
    num = len(rollouts)
    return {
        "score_mean": float(scores.mean()),
        f"{prefix}right_rate": float((scores >= right_score).double().mean()),
        f"{prefix}unparsable_rate": sum(r.final is None for r in rollouts) / num,
        "exact_rate": sum(map(is_right, rollouts)) / num,
        "reasoned_rate": sum(r.reasoned for r in rollouts) / num,
        "response_length_mean": sum(len(r.response_ids) for r in rollouts) / num,
        "truncated_rate": sum(r.truncated for r in rollouts) / num,
    }


def sample_row(
    rollout: Rollout, score: float, verifier: VerifierConfig, *, step: int, split: str
) -> dict[str, Any]:
    """A sampled text with its verdict, for people to read."""
    verdict = (
        "unparsable" if rollout.final is None else "right" if score >= verifier.right else "wrong"
    )
    return {
        "step": step,
        "split": split,
        "prompt": rollout.problem.question,
        "response": rollout.text,
        "answer": rollout.problem.answer,
        "score": round(score, 6),
        "verdict": verdict,
    }


class UpdateMeter:
    """Sums over a step's micro-batches, made means over all tokens of all ranks at the end."""

    def __init__(self) -> None:
        self.sums = torch.zeros(6, dtype=torch.float64, device=dist.device())
        self.first_gap = torch.zeros(1, device=dist.device())
        self.norms: list[tuple[float, float]] = []
        self.rates = (0.0, 0.0)
        """Learning rates of policy and critic at the last optimizer step."""

    def add(self, pg: ppo.PolicyLoss, vf: ppo.ValueLoss, *, first_minibatch: bool) -> None:
        parts = (
            pg.loss_sum,
            pg.clip_sum,
            pg.approx_kl_sum,
            vf.loss_sum,
            pg.dual_clip_sum,
            pg.num_tokens,
        )
        self.sums += torch.stack([part.detach().double() for part in parts])
        if first_minibatch:
            self.first_gap = torch.maximum(self.first_gap, pg.ratio_max_abs_log)

    def add_step(self, policy: StepResult, critic: StepResult) -> None:
        self.norms.append((policy.grad_norm, critic.grad_norm))

    def result(self) -> dict[str, float]:
        """ratio_first_minibatch_max is max |log rho| before the first optimizer step, when the policy has not moved: 0 but for
        rounding. Gradient norms are means over the step's optimizer steps, before clipping; skipped steps left out."""
        sums = dist.all_sum(self.sums).tolist()
        policy, critic = (
            [n for n in norms if math.isfinite(n)] for norms in zip(*self.norms, strict=True)
        )
        return {
            "policy_loss": sums[0] / sums[5],
            "clip_fraction": sums[1] / sums[5],
            "dual_clip_fraction": sums[4] / sums[5],
            "approx_kl": sums[2] / sums[5],
            "value_loss": sums[3] / sums[5],
            "ratio_first_minibatch_max": float(dist.all_max(self.first_gap)),
            "grad_norm_policy": sum(policy) / len(policy) if policy else math.nan,
            "grad_norm_value": sum(critic) / len(critic) if critic else math.nan,
        }
