"""Whitening of advantages, and advantages from groups of responses, which need no critic."""

from __future__ import annotations

import torch
from torch import Tensor

from .token_masks import as_float, check_mask, select


@torch.no_grad()
def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    mean: Tensor | float | None = None,
    var: Tensor | float | None = None,
) -> Tensor:
    """Normalises to mean 0 and variance 1 over the mask.

        (x - mean) / sqrt(var + 1e-8)

    A single token has no variance; it becomes 0.

    Args:
        x: [tokens].
        mask: [tokens].
        mean: mean over all ranks; default: over the mask.
        var: variance over all ranks; default: over the mask, with divisor n - 1.

    Returns:
        [tokens], 0 off the mask, without gradient.

    Raises:
        ValueError: shapes disagree, or only one of mean and var is given.
    """
    mask = check_mask(x, mask)
    if (mean is None) != (var is None):
        raise ValueError(f"mean={mean} and var={var}: give both or neither")
    x = select(x, mask)
    if mean is None or var is None:
        mean = x.sum() / mask.sum().clamp(min=1)
        var = torch.where(mask, x - mean, 0.0).square().sum() / (mask.sum() - 1).clamp(min=1)
    return torch.where(mask, (x - mean) / (var + 1e-8) ** 0.5, 0.0)


@torch.no_grad()
def group_advantages(scores: Tensor, groups: Tensor, *, kind: str) -> Tensor:
    """Advantages without a critic: each score against the others of its group.

        rloo         s - mean of the group's other scores
        grpo         (s - group mean) / (group std + 1e-6), std with divisor n - 1
        reinforce++  d = s - group mean; (d - mean d) / sqrt(var d + 1e-8) over all scores, var
                     with divisor n - 1; d = s if every group has one score

    Args:
        scores: [seqs], of all ranks.
        groups: [seqs] integers; scores with the same number belong together.
        kind: "rloo", "grpo" or "reinforce++".

    Returns:
        [seqs], without gradient.

    Raises:
        ValueError: another kind, shapes that differ, or a group of one, except where all are.

    Source: arXiv 2402.14740; arXiv 2402.03300, section 4.1; arXiv 2501.03262.
    """
    if scores.ndim != 1 or groups.shape != scores.shape or groups.is_floating_point():
        shapes = f"{list(scores.shape)} and {list(groups.shape)}"
        raise ValueError(
            f"scores and groups have shapes {shapes}: both must be [seqs], groups of integers"
        )
    if kind not in ("rloo", "grpo", "reinforce++"):
        raise ValueError(f"kind is {kind!r}, must be 'rloo', 'grpo' or 'reinforce++'")
    score = as_float(scores)
    everything = torch.ones_like(scores, dtype=torch.bool)
    ids, group, sizes = groups.unique(return_inverse=True, return_counts=True)
    if kind == "reinforce++" and bool((sizes == 1).all()):
        return whiten(score, everything)
    if bool((sizes == 1).any()):
        raise ValueError(
            f"group {int(ids[sizes == 1][0])} has 1 score, {kind} needs at least 2: "
            "sample more or drop the group"
        )
    mean = score.new_zeros(len(ids)).index_add(0, group, score) / sizes
    centred = score - mean[group]
    if kind == "rloo":  # s - (n mean - s) / (n - 1) = (s - mean) n / (n - 1)
        return centred * (sizes / (sizes - 1)).to(score.dtype)[group]
    if kind == "grpo":
        var = score.new_zeros(len(ids)).index_add(0, group, centred.square()) / (sizes - 1)
        return centred / (var.sqrt() + 1e-6)[group]
    return whiten(centred, everything)
