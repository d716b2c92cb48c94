"""Which texts share a long run of characters with evaluation items. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
BREAK = "\n"  # stands between texts; a normalised text holds none
CHUNK = 1 << 20  # characters of texts hashed at once
FILTER_BITS = 26

Hashes = NDArray[np.uint64]


def normalise(text: str) -> str:
    """Case folded, every run of white space one blank, none at the ends."""
    return " ".join(text.casefold().split())


def overlaps(texts: Sequence[str], evaluation: Sequence[str], *, length: int = 64) -> list[bool]:
    """For each text, whether any `length` consecutive characters of it stand in an evaluation text, both normalised.

    A text that is shorter than `length` when normalised overlaps with nothing. Exact: the hashes of all windows (Karp and
    Rabin, IBM J. Res. Dev. 31 (1987), p. 249) find the candidates, and these are compared character by character.
    Takes about 40 bytes for each character of the evaluation texts. Raises ValueError for a length below 1.
    """
    if length < 1:
        raise ValueError(f"length={length}: must be at least 1 character")
    haystack = BREAK.join(map(normalise, evaluation))
    windows = _window_hashes(haystack, length)
    whole = ~_holds_break(haystack, length)
    order = np.argsort(windows[whole])
    known, places = windows[whole][order], np.flatnonzero(whole)[order]
    seen = np.zeros(
        1 << FILTER_BITS, dtype=bool
    )  # sends most windows away before the binary search
    seen[known >> (64 - FILTER_BITS)] = True
    found = [False] * len(texts)
    for first, part in _chunks(texts):
        joined = BREAK.join(part)
        starts = np.cumsum([0, *(len(text) + 1 for text in part[:-1])])
        hashes = _window_hashes(joined, length)
        likely = np.flatnonzero(seen[hashes >> (64 - FILTER_BITS)])
        ranks = np.searchsorted(known, hashes[likely])
        hit = np.flatnonzero(known[np.minimum(ranks, len(known) - 1)] == hashes[likely])
        owners = np.searchsorted(starts, likely[hit], side="right") - 1
        for owner, start, place in zip(
            owners.tolist(), likely[hit].tolist(), places[ranks[hit]].tolist(), strict=True
        ):
            if not found[first + owner]:
                window = joined[start : start + length]
                same = (
                    haystack[place : place + length] == window or window in haystack
                )  # the latter after a collision
                found[first + owner] = same and BREAK not in window
    return found


def _chunks(texts: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Runs of normalised texts of about CHUNK characters, each with the number of its first."""
    first, part, size = 0, [], 0
    for number, text in enumerate(texts):
        part.append(normalise(text))
        size += len(part[-1])
        if size >= CHUNK or number == len(texts) - 1:
            yield first, part
            first, part, size = number + 1, [], 0


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _window_hashes(text: str, length: int) -> Hashes:
    """A hash for every window: sum of scrambled character j times BASE^(j - start), modulo 2^64. [characters - length + 1]"""
    codes = (_codes(text).astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    codes ^= codes >> np.uint64(31)
    codes *= _powers(BASE, len(codes))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes, dtype=np.uint64)])
    hashes = sums[length:] - sums[:-length]
    hashes *= _powers(pow(BASE, -1, 1 << 64), len(hashes))
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0x94D049BB133111EB)
    return hashes


def _powers(base: int, count: int) -> Hashes:
    factors = np.full(count, base, dtype=np.uint64)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)


def _holds_break(text: str, length: int) -> NDArray[np.bool_]:
    """For every window, whether a break lies in it."""
    breaks = np.concatenate([[0], np.cumsum(_codes(text) == ord(BREAK))])
    return breaks[length:] > breaks[:-length]
