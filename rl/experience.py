"""A step's rollouts with their fixed targets, divided over ranks, mini-batches and micro-batches.

Rollouts are small and models are large: every rank holds all rollouts of the step and works on its
share of the tokens. So shares are balanced, counts are known without communication, and the update
does not depend on the number of ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.training import dist
from ..core.training.packing import PackedBatch, empty_batch, share_out
from .rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class Experience:
    """The packed rollouts of a step and their targets: [tokens] each, on the host."""

    batch: PackedBatch
    logprobs: Tensor
    """Log-probs of the policy that sampled, by the trainer's own forward pass."""
    values: Tensor
    """The critic's values before the update."""
    advantages: Tensor
    """Advantages, times the weights of the tokens in the policy loss."""
    returns: Tensor
    """Targets of the critic."""
    ref_logprobs: Tensor
    """Log-probs of the reference."""
    rewards: Tensor
    """Scores and KL penalties, of which the returns are made."""
    kl_coef: float = 0.0
    """Coefficient of the KL divergence as a loss."""

    def minibatches(self, num: int, *, seed: tuple[int, ...]) -> Iterator[MiniBatch]:
        """Yields `num` mini-batches of whole sequences, equally many, in a seeded permutation.

        There are fewer where the step has fewer sequences, since none may be empty. The
        permutation is the same on every rank.
        """
        order = np.random.default_rng(seed).permutation(self.batch.num_seqs)
        for number, seqs in enumerate(np.array_split(order, min(num, len(order)))):
            yield MiniBatch(experience=self, seqs=seqs.tolist(), number=number)

    def epoch(self, number: int, num: int, *, seed: tuple[int, ...]) -> Iterator[MiniBatch]:
        """The mini-batches of an epoch, which are numbered over all epochs of the step.

        Args:
            number: number of the epoch, from 0.
            num: mini-batches of each epoch.
            seed: seed of the step.
        """
        for mini in self.minibatches(num, seed=(*seed, number)):
            yield replace(mini, number=number * num + mini.number)


def judged(
    rollouts: Sequence[Rollout], scores: Tensor, *, grouped: bool
) -> tuple[list[Rollout], Tensor]:
    """Selects the rollouts that the update is made of: those with a verdict.

    Args:
        rollouts: the step's rollouts.
        scores: [rollouts], NaN without a verdict.
        grouped: whether a score is compared with those of the same problem; a rollout that is left
            alone by the missing verdicts then has no advantage, and is left out too.

    Returns:
        The rollouts and their scores.
    """
    kept = (~scores.isnan()).nonzero().flatten().tolist()
    if grouped and len(kept) < len(rollouts):
        sizes = Counter(rollouts[n].problem.index for n in kept)
        kept = [n for n in kept if sizes[rollouts[n].problem.index] > 1]
    return [rollouts[n] for n in kept], scores[kept]


@dataclass(frozen=True, kw_only=True)
class MiniBatch:
    """The sequences of one optimizer step, over all ranks."""

    experience: Experience
    seqs: list[int]
    """Sequence numbers."""
    number: int = 0
    """Number of mini-batches of this step before it."""

    @property
    def num_response_tokens(self) -> int:
        """Response tokens of the mini-batch, over all ranks."""
        batch = self.experience.batch
        return int(batch.response_mask[batch.token_index(self.seqs)].sum())

    def microbatches(self, max_tokens: int) -> Iterator[MicroBatch]:
        """Yields this rank's share in micro-batches of at most `max_tokens` tokens.

        Every rank gets equally many; some may be empty.
        """
        shares = share(self.experience.batch, self.seqs, max_tokens)
        for number, seqs in enumerate(shares):
            yield _micro(self.experience, seqs, last=number == len(shares) - 1)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The sequences of one forward and backward pass, on this rank's device.

    Fields are [tokens] each, as in `Experience`.
    """

    batch: PackedBatch
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    ref_logprobs: Tensor
    kl_coef: float
    """Coefficient of the KL divergence as a loss."""
    last: bool
    """Whether it is the last of its mini-batch."""

    @property
    def mask(self) -> Tensor:
        """[tokens] bool, response tokens."""
        return self.batch.response_mask


def _micro(experience: Experience, seqs: Sequence[int], *, last: bool) -> MicroBatch:
    device = dist.device()
    if not seqs:
        zero = torch.zeros(1, device=device)
        return MicroBatch(
            batch=empty_batch().to(device),
            logprobs=zero,
            values=zero,
            advantages=zero,
            returns=zero,
            ref_logprobs=zero,
            kl_coef=experience.kl_coef,
            last=last,
        )
    index = experience.batch.token_index(seqs)
    return MicroBatch(
        batch=experience.batch.select(seqs).to(device),
        logprobs=experience.logprobs[index].to(device),
        values=experience.values[index].to(device),
        advantages=experience.advantages[index].to(device),
        returns=experience.returns[index].to(device),
        ref_logprobs=experience.ref_logprobs[index].to(device),
        kl_coef=experience.kl_coef,
        last=last,
    )


def share(batch: PackedBatch, seqs: Sequence[int], max_tokens: int) -> list[list[int]]:
    """This rank's micro-batches of some sequences, as sequence numbers; equally many on every rank.

    Raises:
        ValueError: a sequence has more than `max_tokens` tokens.
    """
    lengths = [batch.lengths[s] for s in seqs]
    plan = share_out(
        lengths,
        max_tokens=max_tokens,
        rank=dist.rank(),
        world_size=dist.world_size(),
    )
    return [[seqs[i] for i in micro] for micro in plan]


@torch.no_grad()
def compute(
    forward: Callable[[PackedBatch], Any], batch: PackedBatch, max_tokens: int
) -> tuple[Tensor, ...]:
    """Runs a forward pass over all tokens of a batch, each rank computing its share.

    Args:
        forward: maps a packed batch to one [tokens] tensor or a tuple of them.
        batch: the sequences, the same on every rank.
        max_tokens: tokens of one forward pass.

    Returns:
        The tensors of `forward` for the whole batch, [tokens] on the host of every rank.
    """
    device = dist.device()
    totals: list[Tensor] = []
    for seqs in share(batch, range(batch.num_seqs), max_tokens):
        micro = batch.select(seqs) if seqs else empty_batch()
        result = forward(micro.to(device))
        parts = result if isinstance(result, tuple) else (result,)
        totals = totals or [torch.zeros(batch.num_tokens, device=device) for _ in parts]
        if seqs:
            index = batch.token_index(seqs).to(device)
            for total, part in zip(totals, parts, strict=True):
                total[index] = part.float()
    return tuple(dist.all_sum(total).cpu() for total in totals)
