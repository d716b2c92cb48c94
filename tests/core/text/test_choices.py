"""Short replies, as small models give them to a multiple-choice question."""

from __future__ import annotations

import pytest

from verippo.core.text.choices import extract_choice

FOUR = {"A": "Insulin", "B": "Heparin", "C": "Warfarin", "D": "Digoxin"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" (B) ", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("B. Heparin", "B"),
        ("B) Heparin, as A is wrong", "B"),
        ("B\nBecause", "B"),
        ("The answer is B.", "B"),
        ("Not A. The answer is A? No: the answer is (C).", "C"),
        ("Answer: D", "D"),
        ("答案是B。", "B"),
        ("答案：C", "C"),
        ("（B）", "B"),
        ("A patient has it", None),
        ("Because", None),
        ("E", None),
        ("", None),
        ("The answer is Aspirin", None),
        ("the answer is a drug", None),
        ("A or B", None),
    ],
)
def test_the_letter_of_a_multiple_choice_answer(text, letter):
    assert extract_choice(text, FOUR) == letter
