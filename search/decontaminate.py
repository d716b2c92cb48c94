"""Finds texts that share a long run of characters with evaluation items."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

BASE = 0x9E3779B97F4A7C15
"""Base of the rolling hash: odd, so that it has an inverse modulo 2^64."""
BREAK = "\n"
"""Separates texts; normalised texts do not contain it."""
CHUNK = 1 << 20
"""Characters of texts hashed at once."""
FILTER_BITS = 26

Hashes = NDArray[np.uint64]


def normalise(text: str) -> str:
    """The text with case folded, white space collapsed, and none at its ends."""
    return " ".join(text.casefold().split())


def overlaps(texts: Sequence[str], evaluation: Sequence[str], *, length: int = 64) -> list[bool]:
    """Whether each text shares `length` consecutive characters with an evaluation text.

    Both are normalised first. A text shorter than `length` overlaps with nothing. Exact: hashes of
    all windows find candidates, which are compared character by character. Takes about 40 bytes
    per character of the evaluation texts.

    Args:
        texts: texts to check.
        evaluation: texts of evaluation items.
        length: number of characters.

    Raises:
        ValueError: length is below 1.

    Source: Karp and Rabin, IBM J. Res. Dev. 31 (1987), p. 249.
    """
    if length < 1:
        raise ValueError(f"length={length}: must be at least 1 character")
    haystack = BREAK.join(map(normalise, evaluation))
    windows = _window_hashes(haystack, length)
    whole = ~_holds_break(haystack, length)
    order = np.argsort(windows[whole])
    known = windows[whole][order]
    places = np.flatnonzero(whole)[order]
    # rules out most windows before the binary search
    seen = np.zeros(1 << FILTER_BITS, dtype=bool)
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
        candidates = (owners.tolist(), likely[hit].tolist(), places[ranks[hit]].tolist())
        for owner, start, place in zip(*candidates, strict=True):
            if not found[first + owner]:
                window = joined[start : start + length]
                same = haystack[place : place + length] == window
                same = same or window in haystack  # after a collision of hashes
                found[first + owner] = same and BREAK not in window
    return found


def _chunks(texts: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Runs of normalised texts of about CHUNK characters, with the number of the first text."""
    first = 0
    part: list[str] = []
    size = 0
    for number, text in enumerate(texts):
        part.append(normalise(text))
        size += len(part[-1])
        if size >= CHUNK or number == len(texts) - 1:
            yield first, part
            first = number + 1
            part = []
            size = 0


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _window_hashes(text: str, length: int) -> Hashes:
    """A hash of every window, [characters - length + 1].

    The hash is the sum of scrambled character j times BASE^(j - start), modulo 2^64.
    """
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
    """Whether each window contains a break."""
    breaks = np.concatenate([[0], np.cumsum(_codes(text) == ord(BREAK))])
    return breaks[length:] > breaks[:-length]
