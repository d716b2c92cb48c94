"""Finds texts that share a long run of characters with evaluation items."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BASE = 0x9E3779B97F4A7C15
"""Base of the rolling hash: odd, so that it has an inverse modulo 2^64."""
BREAK = "\n"
"""Separates texts; normalised texts do not contain it."""
CHUNK = 256
"""Number of texts hashed at once."""
FILTER_BITS = 26
"""The filter of known hashes has 2^FILTER_BITS entries, which is 64 MiB."""

Hashes = NDArray[np.uint64]


def normalise(text: str) -> str:
    """Folds case, replaces each run of white space by one space, and removes it at the ends."""
    return " ".join(text.casefold().split())


def overlaps(texts: Sequence[str], evaluation: Sequence[str], *, length: int = 64) -> list[bool]:
    """Whether each text shares `length` consecutive characters with an evaluation text.

    Texts are normalised first. A text shorter than `length` overlaps with nothing. The result is
    exact: hashes of all windows find candidates, which are then compared character by character.
    Takes about 40 bytes of memory per character of the evaluation texts.

    Args:
        texts: texts to check.
        evaluation: texts of evaluation items.
        length: number of characters.

    Returns:
        A bool for each text.

    Raises:
        ValueError: length is below 1.

    Source: Karp and Rabin, IBM J. Res. Dev. 31 (1987), p. 249.
    """
    if length < 1:
        raise ValueError(f"length={length}: must be at least 1 character")
    haystack = BREAK.join(map(normalise, evaluation))
    windows = _window_hashes(haystack, length)
    places = np.argsort(windows)
    known = windows[places]
    # rules out most windows before the binary search
    seen = np.zeros(1 << FILTER_BITS, dtype=bool)
    seen[known >> (64 - FILTER_BITS)] = True
    found = [False] * len(texts)
    for first in range(0, len(texts), CHUNK):
        part = [normalise(text) for text in texts[first : first + CHUNK]]
        ends = np.cumsum([len(text) + 1 for text in part])
        joined = BREAK.join(part)
        hashes = _window_hashes(joined, length)
        likely = np.flatnonzero(seen[hashes >> (64 - FILTER_BITS)])
        ranks = np.searchsorted(known, hashes[likely], side="right") - 1
        hit = known[ranks] == hashes[likely]
        starts = likely[hit]
        owners = first + np.searchsorted(ends, starts, side="right")
        for owner, start, place in zip(owners, starts, places[ranks[hit]], strict=True):
            window = joined[start : start + length]
            if not found[owner] and BREAK not in window:
                # the search in the whole haystack is for windows whose hashes collide
                found[owner] = haystack.startswith(window, place) or window in haystack
    return found


def _window_hashes(text: str, length: int) -> Hashes:
    """The hash of every window, [characters - length + 1].

    A hash is the sum over the window of its scrambled character j times BASE^j, modulo 2^64.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    codes = (codes.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    codes ^= codes >> np.uint64(31)
    codes *= _powers(BASE, len(codes))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes, dtype=np.uint64)])
    hashes = sums[length:] - sums[:-length]
    hashes *= _powers(pow(BASE, -1, 1 << 64), len(hashes))
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0x94D049BB133111EB)
    return hashes


def _powers(base: int, count: int) -> Hashes:
    """base^0, base^1, ..., base^(count - 1), modulo 2^64."""
    factors = np.full(count, base, dtype=np.uint64)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)
