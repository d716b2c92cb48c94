"""The formulas of PPO on packed tokens: rewards, advantages, whitening, losses. Tensors in, tensors out.

Every `[tokens]` tensor speaks of tokens[i]. A mask, boolean or integer, marks the response tokens; what stands off it
is selected away before any arithmetic, so that NaN there changes neither outputs nor gradients. Results are fp32
(float64 for float64 inputs), log-probs and KL in nats. Losses are sums over the mask: the caller divides by the
response tokens of the whole mini-batch, over all its micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.gae import discounted_suffix_sums

LOG_RATIO_LIMIT = 20.0  # nats; log-ratios are clamped to +- this before exp: e^20 leaves fp32 room for sums and squares


class PolicyLoss(NamedTuple):
    """What `policy_loss` returns, 0-dim each; only loss_sum has a gradient. Over num_tokens the sums become means."""

    loss_sum: Tensor
    num_tokens: Tensor
    clip_sum: Tensor  # tokens whose clipped branch is the larger: no gradient
    dual_clip_sum: Tensor  # tokens held by dual_clip: no gradient
    approx_kl_sum: Tensor  # nats
    ratio_max_abs_log: Tensor  # max |log rho| before the clamp, in nats; 0 without tokens


class ValueLoss(NamedTuple):
    """What `value_loss` returns: as PolicyLoss."""

    loss_sum: Tensor
    num_tokens: Tensor
    clip_sum: Tensor


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str) -> Tensor:
    """Estimates of KL(policy || reference) at tokens sampled from the policy, with l = logprobs - ref_logprobs.

        k1 = l        k2 = l^2 / 2        k3 = exp(-l) - 1 + l        http://joschu.net/blog/kl-approx.html

    k1 and k3 are unbiased, k2 and k3 never negative. In the exp of k3, -l is clamped to +-20. Both [n] -> [n] in nats,
    differentiable. Raises ValueError for another estimator and shapes that differ.
    """
    _check_shapes(logprobs, ref_logprobs=ref_logprobs)
    log_ratio = _float(logprobs) - _float(ref_logprobs)
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return torch.expm1((-log_ratio).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)) + log_ratio
    raise ValueError(f"estimator is {estimator!r}, must be 'k1', 'k2' or 'k3'")


@torch.no_grad()
def token_rewards(
    scores: Tensor | Sequence[float],
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    response_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
) -> Tensor:
    """reward_t = -kl_coef * kl_t + [t is the last response token of its sequence] * score; arXiv 2203.02155 eq. 2.

    scores [seqs]; logprobs, ref_logprobs, response_mask [tokens]; cu_seqlens [seqs+1] -> [tokens], 0 off the mask.
    With kl_coef 0 ref_logprobs is not read and may be None. Raises ValueError for shapes that do not fit, kl_coef < 0,
    and a sequence without a response token to take its score, unless that is exactly 0 (a dummy): nothing is lost then.
    """
    index, segment, num_seqs = _response_tokens(logprobs, response_mask, cu_seqlens)
    score = torch.as_tensor(scores, dtype=_float(logprobs).dtype, device=logprobs.device)
    if score.shape != (num_seqs,):
        raise ValueError(
            f"scores has shape {list(score.shape)}, must be [{num_seqs}], one for each sequence"
        )
    lost = (torch.bincount(segment, minlength=num_seqs) == 0) & (score != 0)
    if bool(lost.any()):
        i = int(lost.nonzero()[0])
        raise ValueError(
            f"sequence {i} has no response token to take its score {float(score[i])}: drop it, or score 0"
        )
    if not kl_coef >= 0 or (kl_coef > 0 and ref_logprobs is None):
        raise ValueError(f"kl_coef is {kl_coef}, must be at least 0, and 0 without ref_logprobs")
    rewards = torch.zeros_like(logprobs, dtype=score.dtype)
    if ref_logprobs is not None and kl_coef > 0:
        _check_shapes(logprobs, ref_logprobs=ref_logprobs)
        kl = kl_estimate(logprobs[index], ref_logprobs[index], estimator=estimator)
        rewards[index] = (-kl_coef * kl).to(rewards.dtype)
    last = ~_continues(segment)
    rewards[index[last]] += score[segment[last]]
    return rewards


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates over the response tokens of each sequence; arXiv 1506.02438 eq. 16.

        delta_t = reward_t + gamma V_{t+1} - V_t      A_t = delta_t + gamma lam A_{t+1}      return_t = A_t + V_t

    t+1 is the *next response token* of the sequence, across gaps in the mask (turns, tool output); V = A = 0 beyond the
    last. rewards, values, response_mask [tokens]; cu_seqlens [seqs+1]; lam a number, or [seqs] (arXiv 2504.05118).
    Returns (advantages, returns), [tokens] each: not whitened, without gradient, 0 off the mask.
    Raises ValueError for shapes that do not fit and for gamma or lam outside 0..1.
    """
    index, segment, num_seqs = _response_tokens(rewards, response_mask, cu_seqlens)
    _check_shapes(rewards, values=values)
    reward, value = _float(rewards[index]), _float(values[index])
    lam_of = torch.as_tensor(lam, dtype=reward.dtype, device=reward.device)
    if lam_of.shape not in ((), (num_seqs,)) or not (
        0 <= gamma <= 1 and bool(((lam_of >= 0) & (lam_of <= 1)).all())
    ):
        raise ValueError(
            f"gamma={gamma} and lam={lam} must lie in 0..1, and lam be a number or of shape [{num_seqs}]"
        )
    continues = _continues(segment)
    next_value = torch.where(
        continues, value.roll(-1), 0.0
    )  # roll brings the first to the end; continues[-1] is False
    delta = reward + gamma * next_value - value
    decay = torch.where(continues, gamma * lam_of.expand(num_seqs)[segment], 0.0).to(delta.dtype)
    longest = int(torch.bincount(segment).max()) if len(segment) > 0 else 0
    advantage = discounted_suffix_sums(delta, decay, max_length=longest)
    nothing = torch.zeros_like(rewards, dtype=delta.dtype)
    return nothing.index_copy(0, index, advantage), nothing.index_copy(0, index, advantage + value)


@torch.no_grad()
def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    mean: Tensor | float | None = None,
    var: Tensor | float | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) on the mask, 0 off it. The mean goes too.

    The moments are those over the mask, var with divisor n - 1, unless given: give those of all ranks. A lone token has
    no such variance; it is taken as 0, and the token whitens to 0. No tokens give zeros.
    x, mask [tokens]; mean, var numbers or 0-dim -> [tokens]. Raises ValueError when one of mean and var is missing.
    """
    mask = _check_mask(x, mask)
    if (mean is None) != (var is None):
        raise ValueError(f"mean={mean} and var={var}: give both or neither")
    x = _select(x, mask)
    if mean is None or var is None:
        mean = x.sum() / mask.sum().clamp(min=1)
        var = torch.where(mask, x - mean, 0.0).square().sum() / (mask.sum() - 1).clamp(min=1)
    return torch.where(mask, (x - mean) / (var + 1e-8) ** 0.5, 0.0)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    importance: Tensor | None = None,
) -> PolicyLoss:
    """The clipped surrogate, to be minimised: arXiv 1707.06347 eq. 7, with two bounds as in arXiv 2503.14476 sec. 3.1.

        rho = exp(clamp(logprobs - old_logprobs, +-20))    loss = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))

    dual_clip = c > 1 holds it where A < 0: loss = min(loss, -c A), arXiv 1912.09729 eq. 5. importance [tokens]
    multiplies each token's loss: a truncated weight for the sampler's log-probs, or 1 / length for a sequence-mean.
    approx_kl_sum = sum(rho - 1 - log rho), which is k3 for KL(old || new): http://joschu.net/blog/kl-approx.html.
    All [tokens]; gradients reach logprobs only. Raises ValueError for shapes that do not fit and clips out of range.
    """
    mask = _check_mask(logprobs, mask)
    _check_shapes(logprobs, old_logprobs=old_logprobs, advantages=advantages)
    if not (0 < clip_low <= 1 and clip_high > 0):
        raise ValueError(
            f"clip_low={clip_low} must lie in (0, 1] and clip_high={clip_high} be over 0"
        )
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}, must be over 1: None turns it off")
    advantage = _select(advantages.detach(), mask)
    log_ratio = _select(logprobs, mask) - _select(old_logprobs.detach(), mask)
    largest = log_ratio.detach().abs().max() if len(mask) > 0 else log_ratio.new_zeros(())
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, clipped)
    held = torch.zeros_like(mask)
    if dual_clip is not None:
        held = (advantage < 0) & (loss > -dual_clip * advantage)
        loss = torch.where(held, -dual_clip * advantage, loss)
    if importance is not None:
        _check_shapes(logprobs, importance=importance)
        loss = loss * _select(importance.detach(), mask)
    approx_kl = torch.expm1(log_ratio.detach()) - log_ratio.detach()
    return PolicyLoss(
        loss.sum(), mask.sum(), (clipped > plain).sum(), held.sum(), approx_kl.sum(), largest
    )


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = 0.2
) -> ValueLoss:
    """Half the critic's squared error, its move from the old values bounded: arXiv 2005.12729, "value clipping".

        loss = 0.5 max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2)        clip=None: 0.5 (V - R)^2

    All [tokens]; gradients reach values only. Raises ValueError for shapes that do not fit and clip <= 0.
    """
    mask = _check_mask(values, mask)
    _check_shapes(values, old_values=old_values, returns=returns)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}, must be over 0: None turns it off")
    value, target = _select(values, mask), _select(returns.detach(), mask)
    error = (value - target).square()
    held = torch.zeros_like(mask)
    if clip is not None:
        old = _select(old_values.detach(), mask)
        clipped_error = (value.clamp(old - clip, old + clip) - target).square()
        held = clipped_error > error
        error = torch.maximum(error, clipped_error)
    return ValueLoss(0.5 * error.sum(), mask.sum(), held.sum())


@torch.no_grad()
def group_advantages(scores: Tensor, groups: Tensor, *, kind: str) -> Tensor:
    """Advantages without a critic: each score [seqs] against those with the same id in groups [seqs] -> [seqs].

        rloo          s - mean of the group's other scores                                     arXiv 2402.14740
        grpo          (s - group mean) / (group std + 1e-6), std with divisor n - 1            arXiv 2402.03300 sec. 4.1
        reinforce++   d = s - group mean; (d - mean d) / sqrt(var d + 1e-8) over all scores given, var with divisor
                      n - 1: "with baseline" of arXiv 2501.03262. If every group has one score: the plain form, d = s.

    Pass the scores of all ranks. Raises ValueError for another kind, shapes that differ, no integer ids, and a group of
    one (reinforce++: beside larger ones), which has nothing to be compared with.
    """
    if scores.ndim != 1 or groups.shape != scores.shape or groups.is_floating_point():
        shapes = f"{list(scores.shape)} and {list(groups.shape)}"
        raise ValueError(
            f"scores and groups have shapes {shapes}: must be [seqs] both, groups of integers"
        )
    if kind not in ("rloo", "grpo", "reinforce++"):
        raise ValueError(f"kind is {kind!r}, must be 'rloo', 'grpo' or 'reinforce++'")
    score, everything = _float(scores), torch.ones_like(scores, dtype=torch.bool)
    ids, group, sizes = groups.unique(return_inverse=True, return_counts=True)
    if kind == "reinforce++" and bool((sizes == 1).all()):
        return whiten(score, everything)
    if bool((sizes == 1).any()):
        raise ValueError(
            f"group {int(ids[sizes == 1][0])} has 1 score, {kind} needs 2: sample more or drop the group"
        )
    mean = score.new_zeros(len(ids)).index_add(0, group, score) / sizes
    centred = score - mean[group]
    if kind == "rloo":  # s - (n mean - s) / (n - 1) = (s - mean) n / (n - 1)
        return centred * (sizes / (sizes - 1)).to(score.dtype)[group]
    if kind == "grpo":
        var = score.new_zeros(len(ids)).index_add(0, group, centred.square()) / (sizes - 1)
        return centred / (var.sqrt() + 1e-6)[group]
    return whiten(centred, everything)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the mask, 0-dim: 1 for a perfect critic, 0 for a constant one.

    0 also where the returns do not vary and there is nothing to explain. All [tokens]. ValueError for other shapes.
    """
    mask = _check_mask(values, mask)
    _check_shapes(values, returns=returns)
    value, target = _float(values[mask]), _float(returns[mask])
    if len(target) < 2 or bool((target == target[0]).all()):
        return target.new_zeros(())
    return 1 - (target - value).var() / target.var()


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _select(x: Tensor, mask: Tensor) -> Tensor:
    """x on the mask, 0 off it, and a gradient of 0 there: multiplying by the mask would keep a NaN in both."""
    return torch.where(mask, _float(x), 0.0)


def _response_tokens(x: Tensor, mask: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, int]:
    """Positions of the response tokens, the number of each one's sequence, and how many sequences there are."""
    index, boundaries = _check_mask(x, mask).nonzero().squeeze(1), cu_seqlens.tolist()
    if boundaries[:1] != [0] or boundaries[-1] != len(mask) or boundaries != sorted(boundaries):
        raise ValueError(
            f"cu_seqlens is {boundaries}, must rise from 0 to the {len(mask)} tokens of the mask"
        )
    segment = torch.searchsorted(cu_seqlens.to(index.dtype), index, right=True) - 1
    return index, segment, len(boundaries) - 1


def _continues(segment: Tensor) -> Tensor:
    """For each response token, whether another of the same sequence follows."""
    continues = torch.zeros_like(segment, dtype=torch.bool)
    continues[:-1] = segment[1:] == segment[:-1]
    return continues


def _check_mask(x: Tensor, mask: Tensor) -> Tensor:
    if x.ndim != 1 or mask.shape != x.shape:
        raise ValueError(
            f"the mask has shape {list(mask.shape)}, its tensor {list(x.shape)}: both must be [tokens]"
        )
    if mask.is_floating_point():
        raise ValueError(
            f"the mask is {mask.dtype}, must be boolean or integer: was another tensor put in its place?"
        )
    return mask.bool()


def _check_shapes(x: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if other.shape != x.shape:
            raise ValueError(
                f"{name} has shape {list(other.shape)}, must have {list(x.shape)} like the first tensor"
            )
