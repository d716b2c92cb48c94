"""Dynamic sampling: groups with equal scores are dropped, and further prompts take their place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ..core.training import dist
from ..core.training.run import Metrics
from .rollout import Rollout

Sampled = tuple[list[Rollout], Tensor]
"""Rollouts, and their scores [rollouts], NaN without a verdict."""


def groups_that_differ(rollouts: Sequence[Rollout], scores: Tensor) -> list[bool]:
    """Whether the verdicts on the responses to a rollout's problem differ, so that it can teach.

    Args:
        rollouts: responses; those to one problem are a group.
        scores: [rollouts], NaN without a verdict, which counts neither as equal nor as different.

    Returns:
        [rollouts], true for a group with at least two different scores.
    """
    groups: defaultdict[int, set[float]] = defaultdict(set)
    for rollout, score in zip(rollouts, scores.tolist(), strict=True):
        if score == score:  # no NaN
            groups[rollout.problem.index].add(score)
    return [len(groups[rollout.problem.index]) > 1 for rollout in rollouts]


def refill(
    rollouts: list[Rollout],
    scores: Tensor,
    sample: Callable[[int, Sequence[Rollout]], Sampled],
    *,
    rounds: int,
    samples_per_prompt: int,
    right_score: float,
) -> tuple[list[Rollout], Tensor, Metrics]:
    """Drops groups with equal scores, and samples as many further prompts, for some rounds.

    If groups are still missing after the last round, the step is made of those that are there; if
    there are none, of the first rollouts as they are.

    Args:
        rollouts: the step's rollouts.
        scores: [rollouts].
        sample: (number of prompts, rollouts of the step so far) -> their rollouts and scores.
        rounds: number of times that `sample` may be called.
        samples_per_prompt: responses to each prompt.
        right_score: score from which a response counts as right.

    Returns:
        The rollouts to train on, their scores, and metrics.

    Source: arXiv 2503.14476, section 3.2.
    """
    drawn, drawn_scores = list(rollouts), scores
    kept, kept_scores = _differing(rollouts, scores)
    num_first = len(kept)
    for _ in range(rounds):
        missing = (len(rollouts) - len(kept)) // samples_per_prompt
        if not missing:
            break
        more, more_scores = sample(missing, drawn)
        drawn += more
        drawn_scores = torch.cat([drawn_scores, more_scores])
        taken, taken_scores = _differing(more, more_scores)
        kept += taken
        kept_scores = torch.cat([kept_scores, taken_scores])
    judged = drawn_scores[~drawn_scores.isnan()]
    missing = (len(rollouts) - len(kept)) // samples_per_prompt
    metrics: Metrics = {
        "groups_dropped": (len(drawn) - len(kept)) // samples_per_prompt,
        "groups_refilled": (len(kept) - num_first) // samples_per_prompt,
        "groups_missing": missing,
        "sampled_score_mean": float(judged.mean()),
        "sampled_right_rate": float((judged >= right_score).double().mean()),
        "tokens_sampled": sum(rollout.num_trained for rollout in drawn),
        "responses_sampled": len(drawn),
    }
    if missing and dist.is_main():
        total = len(rollouts) // samples_per_prompt
        rest = f"the other {total - missing}" if kept else "all of the first ones"
        tqdm.write(
            f"{missing} of {total} groups still have equal scores at refill_groups={rounds}: "
            f"training on {rest}"
        )
    return (kept, kept_scores, metrics) if kept else (rollouts, scores, metrics)


def _differing(rollouts: Sequence[Rollout], scores: Tensor) -> Sampled:
    differ = groups_that_differ(rollouts, scores)
    kept = [rollout for rollout, keep in zip(rollouts, differ, strict=True) if keep]
    return kept, scores[torch.tensor(differ, dtype=torch.bool)]
