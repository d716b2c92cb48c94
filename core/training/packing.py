"""Packed sequences and balanced micro-batches.

Sequences lie end to end in one [tokens] row; `cu_seqlens` holds where each begins. Index i of every
[tokens] tensor refers to tokens[i]: a log-prob at i is that of tokens[i], a value at i is that of
the state before tokens[i].
"""

from __future__ import annotations

import bisect
import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class PromptAndResponse(Protocol):
    """A rollout or training row, as `pack` reads it.

    It may have a `response_mask`, a boolean for each response token: False for context that tools
    or users wrote. Without one, or with None, all response tokens are trained.
    """

    @property
    def prompt_ids(self) -> Sequence[int]: ...
    @property
    def response_ids(self) -> Sequence[int]: ...


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Sequences packed end to end."""

    tokens: Tensor
    """[tokens] int64."""
    cu_seqlens: Tensor
    """[seqs + 1] int32: first 0, last the number of tokens."""
    response_mask: Tensor
    """[tokens] bool: tokens whose log-prob is trained or scored; it may have gaps."""

    @cached_property
    def boundaries(self) -> list[int]:
        return self.cu_seqlens.tolist()

    @cached_property
    def lengths(self) -> list[int]:
        return [end - start for start, end in pairwise(self.boundaries)]

    @property
    def num_seqs(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return self.boundaries[-1]

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)

    @cached_property
    def num_response_tokens(self) -> int:
        return int(self.response_mask.sum())

    @cached_property
    def response_lengths(self) -> Tensor:
        """[seqs] int64: response tokens of each sequence, gaps not counted."""
        lengths = torch.zeros(self.num_seqs, dtype=torch.int64, device=self.tokens.device)
        return lengths.index_add(0, self.seq_ids, self.response_mask.long())

    @cached_property
    def seq_ids(self) -> Tensor:
        """[tokens] int64: number of the sequence each token belongs to."""
        sizes = torch.tensor(self.lengths, dtype=torch.int64, device=self.tokens.device)
        return torch.repeat_interleave(
            torch.arange(self.num_seqs, device=self.tokens.device), sizes
        )

    @cached_property
    def position_ids(self) -> Tensor:
        """[tokens] int64: position in its sequence, from 0."""
        positions = torch.arange(self.num_tokens, device=self.tokens.device)
        return positions - self.cu_seqlens[:-1].long()[self.seq_ids]

    @cached_property
    def response_positions(self) -> Tensor:
        """[response tokens] int64: where the mask is set.

        The hidden state at p - 1 is that of the state before token p.
        """
        return self.response_mask.nonzero().squeeze(-1)

    def token_index(self, seqs: Sequence[int]) -> Tensor:
        """[tokens of these sequences] int64: takes a [tokens] tensor into the order of `select`."""
        spans = [torch.arange(self.boundaries[s], self.boundaries[s + 1]) for s in seqs]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)

    def select(self, seqs: Sequence[int]) -> PackedBatch:
        """A batch of the given sequences, in the given order."""
        index = self.token_index(seqs).to(self.tokens.device)
        return PackedBatch(
            tokens=self.tokens[index],
            cu_seqlens=_cu_seqlens([self.lengths[s] for s in seqs]).to(index.device),
            response_mask=self.response_mask[index],
        )

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on another device."""
        return PackedBatch(
            tokens=self.tokens.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            response_mask=self.response_mask.to(device),
        )


def pack(rows: Sequence[PromptAndResponse]) -> PackedBatch:
    """Packs prompts and responses; the mask covers each response with its end-of-sequence token.

    Context within a response is left out of the mask: see `PromptAndResponse`. Masks follow from
    lengths and the rows' own masks, never from token ids.

    Raises:
        ValueError: a row has an empty response, or an empty prompt, so that nothing predicts the
            first response token, or its mask does not fit; the message names the row.
    """
    for number, row in enumerate(rows):
        if not len(row.prompt_ids) or not len(row.response_ids):
            part = "response" if len(row.prompt_ids) else "prompt"
            raise ValueError(
                f"row {number} has an empty {part}: nothing to train on; drop it before packing"
            )
    parts = [part for row in rows for part in (row.prompt_ids, row.response_ids)]
    cu_seqlens = _cu_seqlens([len(row.prompt_ids) + len(row.response_ids) for row in rows])
    return PackedBatch(
        tokens=_end_to_end(parts),
        cu_seqlens=cu_seqlens,
        response_mask=_response_mask(rows, cu_seqlens),
    )


def _end_to_end(parts: Sequence[Sequence[int]]) -> Tensor:
    """Token ids as one tensor: [tokens] int64."""
    none = np.empty(0, np.int64)  # numpy wants at least one array
    return torch.from_numpy(np.concatenate([none, *parts], dtype=np.int64))


def _response_mask(rows: Sequence[PromptAndResponse], cu_seqlens: Tensor) -> Tensor:
    """The responses without their context: [tokens] bool."""
    lengths = [length for row in rows for length in (len(row.prompt_ids), len(row.response_ids))]
    mask = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    for number, (row, end) in enumerate(zip(rows, cu_seqlens[1:].tolist(), strict=True)):
        own = getattr(row, "response_mask", None)
        if own is None:
            continue
        trained = np.asarray(own, dtype=bool)
        num = len(row.response_ids)
        if len(trained) != num or not trained.any():
            raise ValueError(
                f"row {number} has {num} response tokens and a response_mask of {len(trained)}, "
                f"{trained.sum()} of them True: it needs one for each, at least one True"
            )
        mask[end - num : end] = trained
    return torch.from_numpy(mask)


def pack_token_rows(rows: Sequence[Sequence[int]]) -> PackedBatch:
    """Packs rows of token ids without response tokens; without rows, the same as `empty_batch`."""
    if not rows:
        return empty_batch()
    tokens = _end_to_end(rows)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    cu_seqlens = _cu_seqlens([len(row) for row in rows])
    return PackedBatch(
        tokens=tokens,
        cu_seqlens=cu_seqlens,
        response_mask=mask,
    )


def empty_batch() -> PackedBatch:
    """A batch without response tokens, for a rank that has no work left.

    The model still runs forward and backward, as ZeRO-3 needs on every rank; gradients are zero.
    """
    return PackedBatch(
        tokens=torch.zeros(1, dtype=torch.int64),
        cu_seqlens=_cu_seqlens([1]),
        response_mask=torch.zeros(1, dtype=torch.bool),
    )


def balance(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Divides items into `num_bins` lists of nearly equal total length.

    Takes the longest first, each into the lightest bin. Lists are in ascending order; some are
    empty if there are fewer items than bins.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, b) for b in range(num_bins)]
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, lightest = heapq.heappop(heap)
        bins[lightest].append(item)
        heapq.heappush(heap, (load + lengths[item], lightest))
    return [sorted(items) for items in bins]


def microbatches(
    lengths: Sequence[int], *, max_tokens: int, num: int | None = None
) -> list[list[int]]:
    """Divides sequences into the fewest micro-batches under a cap, of nearly equal size.

    Args:
        lengths: tokens of each sequence.
        max_tokens: maximum number of tokens in a micro-batch.
        num: number of micro-batches; those not needed stay empty. None: the fewest possible.

    Returns:
        Sequence numbers of each micro-batch.

    Raises:
        ValueError: a sequence is over the cap, or num is too small.
    """
    for number, length in enumerate(lengths):
        _check_length(number, length, max_tokens)
    fewest = best_fit(lengths, max_tokens)
    wanted = len(fewest) if num is None else num
    if wanted < len(fewest):
        raise ValueError(
            f"{len(fewest)} micro-batches are needed under max_tokens_per_gpu={max_tokens}, "
            f"got num={num}"
        )
    balanced = balance(lengths, wanted)
    if all(sum(lengths[i] for i in items) <= max_tokens for items in balanced):
        return balanced
    return fewest + [[] for _ in range(wanted - len(fewest))]


def share_out(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    rank: int,
    world_size: int,
) -> list[list[int]]:
    """One rank's share of the sequences, in micro-batches under a cap.

    Shares have nearly equal numbers of tokens and equal numbers of micro-batches, some perhaps
    empty. Every rank computes the same plan, so no communication is needed.

    Args:
        lengths: tokens of each sequence of all ranks.
        max_tokens: maximum number of tokens in a micro-batch.
        rank: this rank.
        world_size: number of ranks.

    Returns:
        Sequence numbers of each micro-batch.

    Raises:
        ValueError: a sequence is over the cap.
    """
    for number, length in enumerate(lengths):
        _check_length(number, length, max_tokens)
    parts = balance(lengths, world_size)
    shares = [[lengths[i] for i in part] for part in parts]
    num = max(len(microbatches(share, max_tokens=max_tokens)) if share else 0 for share in shares)
    part = parts[rank]
    plan = microbatches(shares[rank], max_tokens=max_tokens, num=num)
    return [[part[i] for i in micro] for micro in plan]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: each item goes into the fullest bin that still holds it.

    Uses at most 11/9 of the fewest possible bins, plus 4 (Johnson 1973).

    Raises:
        ValueError: an item is over the capacity.
    """
    room_of: defaultdict[int, list[int]] = defaultdict(list)  # room left -> bins with it
    open_rooms: list[int] = []  # room left in some bin, ascending
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        if length > capacity:
            raise ValueError(
                f"row {item} has {length} tokens, over the pack's {capacity}: "
                "raise max_seq_len or drop it"
            )
        place = bisect.bisect_left(open_rooms, length)
        if place == len(open_rooms):
            bins.append([])
            chosen = len(bins) - 1
            room = capacity
        else:
            room = open_rooms[place]
            chosen = room_of[room].pop()
            if not room_of[room]:
                open_rooms.pop(place)
        bins[chosen].append(item)
        left = room - length
        if not room_of[left]:
            open_rooms.insert(bisect.bisect_left(open_rooms, left), left)
        room_of[left].append(chosen)
    return [sorted(items) for items in bins]


def _check_length(number: int, length: int, max_tokens: int) -> None:
    if length > max_tokens:
        raise ValueError(
            f"rollout {number} has {length} tokens, over max_tokens_per_gpu={max_tokens}: "
            "raise it or lower sampling.max_new_tokens"
        )


def _cu_seqlens(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
