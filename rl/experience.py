"""A step's rollouts with their fixed targets, and how they are shared out: over ranks, mini-batches, micro-batches.

Rollouts are small and models are large: every rank holds all rollouts of the step and works on its share of the tokens.
So shares are balanced, counts are known without asking, and the update does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.training import dist
from ..core.training.packing import PackedBatch, empty_batch, share_out


@dataclass(frozen=True, kw_only=True)
class Experience:
    """[tokens] each, index i speaks of tokens[i]; on the host."""

    batch: PackedBatch
    logprobs: Tensor
    """of the policy that drew them, by the trainer's own forward"""
    values: Tensor
    advantages: Tensor
    returns: Tensor
    importance: Tensor | None = None
    """Weights of the tokens' policy losses, for a sampler that differs from the trainer."""

    def minibatches(self, num: int, *, seed: tuple[int, ...]) -> Iterator[MiniBatch]:
        """`num` mini-batches of whole sequences, of equal count, in a fresh seeded permutation: the same on every rank."""
        order = np.random.default_rng(seed).permutation(self.batch.num_seqs)
        for seqs in np.array_split(order, num):
            yield MiniBatch(experience=self, seqs=seqs.tolist())


@dataclass(frozen=True, kw_only=True)
class MiniBatch:
    """The sequences of one optimizer step, all ranks together."""

    experience: Experience
    seqs: list[int]

    @property
    def num_response_tokens(self) -> int:
        return int(
            self.experience.batch.response_mask[self.experience.batch.token_index(self.seqs)].sum()
        )

    def microbatches(self, max_tokens: int) -> Iterator[MicroBatch]:
        """This rank's share in micro-batches of at most `max_tokens` tokens: as many on every rank, some perhaps empty."""
        shares = share(self.experience.batch, self.seqs, max_tokens)
        for number, seqs in enumerate(shares):
            yield _micro(self.experience, seqs, last=number == len(shares) - 1)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One forward and backward; on this rank's device. Fields as in Experience."""

    batch: PackedBatch
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    last: bool
    """of its mini-batch"""
    importance: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        return self.batch.response_mask


def _micro(experience: Experience, seqs: Sequence[int], *, last: bool) -> MicroBatch:
    device = dist.device()
    if not seqs:
        nothing = torch.zeros(1, device=device)
        return MicroBatch(
            batch=empty_batch().to(device),
            logprobs=nothing,
            values=nothing,
            advantages=nothing,
            returns=nothing,
            last=last,
        )
    index = experience.batch.token_index(seqs)
    return MicroBatch(
        batch=experience.batch.select(seqs).to(device),
        logprobs=experience.logprobs[index].to(device),
        values=experience.values[index].to(device),
        advantages=experience.advantages[index].to(device),
        returns=experience.returns[index].to(device),
        last=last,
        importance=(
            None if experience.importance is None else experience.importance[index].to(device)
        ),
    )


def share(batch: PackedBatch, seqs: Sequence[int], max_tokens: int) -> list[list[int]]:
    """This rank's part of the sequences, as micro-batches of sequence numbers. Every rank gets as many micro-batches.

    Raises ValueError for a sequence over `max_tokens`.
    """
    lengths = [batch.lengths[s] for s in seqs]
    plan = share_out(lengths, max_tokens=max_tokens, rank=dist.rank(), world_size=dist.world_size())
    return [[seqs[i] for i in micro] for micro in plan]


@torch.no_grad()
def compute(
    forward: Callable[[PackedBatch], Any], batch: PackedBatch, max_tokens: int
) -> tuple[Tensor, ...]:
    """What `forward` gives for every token of the batch, each rank computing its share: [tokens] tensors on the host,
    the same on every rank. `forward` returns one [tokens] tensor or a tuple of them."""
    device, totals = dist.device(), None
    for seqs in share(batch, range(batch.num_seqs), max_tokens):
        micro = batch.select(seqs) if seqs else empty_batch()
        result = forward(micro.to(device))
        parts = result if isinstance(result, tuple) else (result,)
        totals = (
            totals
            if totals is not None
            else [torch.zeros(batch.num_tokens, device=device) for _ in parts]
        )
        if seqs:
            index = batch.token_index(seqs).to(device)
            for total, part in zip(totals, parts, strict=True):
                total[index] = part.float()
    assert totals is not None
    return tuple(dist.all_sum(total).cpu() for total in totals)
