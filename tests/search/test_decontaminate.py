"""Shared runs of characters, against a plain search for every window."""

from __future__ import annotations

import random
import resource
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verippo.search import decontaminate
from verippo.search.decontaminate import normalise, overlaps


def plainly(texts, evaluation, length):
    """The definition, window by window."""
    others = [normalise(text) for text in evaluation]
    windows = [
        [text[n : n + length] for n in range(len(text) - length + 1)]
        for text in map(normalise, texts)
    ]
    return [any(window in other for window in row for other in others) for row in windows]


def test_64_shared_characters_overlap_and_63_do_not():
    shared = "".join(chr(0x4E00 + n) for n in range(64))
    assert overlaps([f"x{shared}y", f"x{shared[:63]}y", f"x{shared[1:]}y"], [f"a{shared}b"]) == [
        True,
        False,
        False,
    ]


def test_case_and_white_space_do_not_matter():
    text = "The patient, a man of forty, has had a FEVER since the last full moon, he says."
    spaced = (
        " the\tPatient,  a man of\nforty, has had a fever since the last full moon,\u3000he SAYS. "
    )
    assert overlaps([text, text.replace("forty", "fifty")], [spaced]) == [True, False]


def test_a_run_may_lie_anywhere_and_in_any_of_the_evaluation_texts():
    rng = random.Random(0)
    evaluation = ["".join(rng.choices("abcdefgh ", k=300)) for _ in range(20)]
    texts = ["".join(rng.choices("ijklmnop ", k=200)) for _ in range(60)]
    for n in range(0, 60, 3):
        start = rng.randrange(230)
        texts[n] += evaluation[n // 3][start : start + 70]
    assert overlaps(texts, evaluation) == [n % 3 == 0 for n in range(60)]


def test_texts_that_stand_side_by_side_are_not_run_together():
    left, right = "a" * 40 + "b" * 20, "c" * 20 + "d" * 40
    assert overlaps([left + right], [left, right]) == [False]
    assert overlaps([left, right], [left + right]) == [False, False]
    assert overlaps([left, right], [left, right]) == [False, False]  # each has 60 characters
    assert overlaps([left, right], [left, right], length=60) == [True, True]


def test_nothing_overlaps_with_nothing():
    assert overlaps([], ["a" * 64]) == []
    assert overlaps(["a" * 64, ""], []) == [False, False]
    assert overlaps(["", " " * 100], ["", " " * 100]) == [False, False]
    with pytest.raises(ValueError, match="length=0"):
        overlaps(["a"], ["a"], length=0)


texts_of = st.lists(st.text(alphabet="aAbß\n 、", max_size=12), max_size=6)


@settings(deadline=None, max_examples=150)
@given(texts_of, texts_of, st.integers(1, 5))
def test_it_agrees_with_a_plain_search(texts, evaluation, length):
    assert overlaps(texts, evaluation, length=length) == plainly(texts, evaluation, length)


def test_colliding_hashes_and_chunk_borders_change_nothing(monkeypatch):
    monkeypatch.setattr(decontaminate, "BASE", 1)  # all windows with the same characters collide
    monkeypatch.setattr(decontaminate, "CHUNK", 7)
    rng = random.Random(1)
    texts, evaluation = (
        [" ".join(rng.choices(["ab", "ba", "c"], k=12)) for _ in range(40)] for _ in range(2)
    )
    found = overlaps(texts, evaluation, length=20)
    assert found == plainly(texts, evaluation, 20)
    assert 0 < sum(found) < 40


def test_it_is_fast_and_small_on_a_twentieth_of_a_full_load():
    rng = random.Random(2)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 10))) for _ in range(5000)]
    texts, evaluation = (
        [" ".join(rng.choices(words, k=90)) for _ in range(count)] for count in (10_000, 500)
    )
    texts[5000] += evaluation[77][100:180].upper()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert [n for n, found in enumerate(overlaps(texts, evaluation)) if found] == [5000]
    assert time.process_time() - start < 3  # a full load: 200,000 and 10,000 within 60 s
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000
    )  # KB; 64 MB of it the filter
