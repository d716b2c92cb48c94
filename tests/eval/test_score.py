"""Extraction of answers: hand-labelled outputs, and changes that must not alter the answer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verippo.eval.questions import load_questions
from verippo.eval.score import (
    accuracy,
    accuracy_original,
    extract,
    extract_choice,
    extract_original,
    final_response,
)

LABELLED = [
    json.loads(line)
    for line in (Path(__file__).parent / "labelled_outputs.jsonl").read_text("utf-8").splitlines()
]
FOUR = {"A": "Amoxicillin", "B": "Ceftriaxone", "C": "Vancomycin", "D": "Metronidazole"}
CAVITIES = [
    "ventral",
    "dorsal",
    "buccal",
    "thoracic",
    "pericardial",
    "abdominal",
    "spinal",
    "pelvic",
    "pleural",
    "cranial",
]
TEN = dict(zip("ABCDEFGHIJ", CAVITIES, strict=True))
# outputs with placeholders for letters: {0} is claimed, others are only mentioned; ⏎: line break
CLAIMS, NO_CLAIMS = (
    [
        line.replace("⏎", "\n")
        for line in (Path(__file__).parent / name).read_text("utf-8").splitlines()
    ]
    for name in ("claims.txt", "no_claims.txt")
)
MARKS = ["**{}**", "*{}*", "__{}__", "_{}_", "`{}`", "<b>{}</b>"]
LETTERS = st.permutations(list(TEN))


def test_labelled_set_is_large_varied_and_well_formed():
    assert len(LABELLED) >= 300
    assert sum(row["letter"] is None for row in LABELLED) >= 80
    assert all(row["letter"] is None or row["letter"] in row["options"] for row in LABELLED)
    assert len({row["kind"] for row in LABELLED}) >= 30
    assert len({(row["output"], *row["options"].values()) for row in LABELLED}) == len(LABELLED)


def test_extraction_matches_99_percent_of_the_labels():
    missed = [
        row for row in LABELLED if extract_choice(row["output"], row["options"]) != row["letter"]
    ]
    assert len(missed) <= len(LABELLED) / 100, missed


@pytest.mark.parametrize(
    "row", [row for row in LABELLED if row["letter"] is None], ids=lambda row: row["output"][-40:]
)
def test_output_without_an_answer_gives_none(row):
    assert extract(row["output"], row["options"]).letter is None


def test_real_items_give_the_stated_letter_and_lists_give_none(shared):
    """Applies styles whose letter is known, and styles without one, to texts of all shapes."""
    questions, _ = load_questions(
        ",".join(str(file) for file in sorted((shared / "data").glob("*.json")))
    )
    missed, false = [], []
    for n, question in enumerate(questions[::3]):
        # a model writes no repeated blanks
        options = {letter: " ".join(text.split()) for letter, text in question.options.items()}
        letter = list(options)[n % len(options)]
        weighed = [
            f"{x}. {text}: this {'fits' if x == letter else 'does not fit'}."
            for x, text in options.items()
        ]
        listed = "\n".join(f"{x}. {text}" for x, text in options.items())
        for output in (
            f"{letter}. {options[letter]}",
            f"So $\\boxed{{{letter}. {options[letter]}}}$",
            f"正确答案是{letter}。",
            f"**{letter}. {options[letter]}** is the best answer, because it fits.",
            f"The correct option is {letter}: {options[letter]}.\n\n"
            "Explanation: the others do not fit.",
            "Let's see.\n\n" + "\n".join(weighed) + f"\n\nTherefore, the answer is **{letter}**.",
        ):
            missed += [output] * (extract_choice(output, options) != letter)
        commented = "\n\n".join(
            f"{x}. {text}: to be weighed against the vignette." for x, text in options.items()
        )
        for output in (
            question.question,
            listed,
            f"{question.question}\n\n{listed}",
            f"Let's go through them:\n\n{commented}",
        ):
            false += [output] * (extract_choice(output, options) is not None)
    assert not missed
    assert len(false) <= len(questions) / 1000  # an item's question may be one of its options


@given(row=st.sampled_from(LABELLED), space=st.text(" \n\t\r", max_size=8))
def test_trailing_white_space_changes_nothing(row, space):
    assert extract(row["output"] + space, row["options"]) == extract(row["output"], row["options"])


@given(claim=st.sampled_from(CLAIMS), letters=LETTERS, mark=st.sampled_from(MARKS))
def test_emphasis_around_the_letter_changes_nothing(claim, letters, mark):
    if any(code in claim for code in ("\\", '"', "{{", "<")):  # not Markdown
        return
    assert extract_choice(claim.format(mark.format(letters[0]), *letters[1:]), TEN) == letters[0]


@given(claim=st.sampled_from(CLAIMS), letters=LETTERS)
def test_claims_are_read_for_every_letter(claim, letters):
    assert extract_choice(claim.format(*letters), TEN) == letters[0]


@given(claim=st.sampled_from(NO_CLAIMS), letters=LETTERS)
def test_sentences_without_a_claim_give_none_for_every_letter(claim, letters):
    assert extract_choice(claim.format(*letters), TEN) is None


@given(
    claims=st.lists(st.sampled_from(CLAIMS + NO_CLAIMS), min_size=1, max_size=3),
    letters=LETTERS,
    order=LETTERS,
)
def test_renaming_the_letters_keeps_the_option(claims, letters, order):
    """Permuting the letters of output and options permutes the answer, and nothing else."""
    renamed = dict(zip(TEN, order, strict=True))
    options = {renamed[letter]: text for letter, text in TEN.items()}
    before = extract("\n".join(claims).format(*letters), TEN)
    after = extract("\n".join(claims).format(*(renamed[letter] for letter in letters)), options)
    assert after == dataclasses.replace(before, letter=before.letter and renamed[before.letter])


@given(output=st.text(max_size=200), num=st.integers(2, 10))
def test_any_text_gives_an_option_or_none(output, num):
    options = dict(list(TEN.items())[:num])
    assert extract_choice(output, options) in {*options, None}


def test_only_the_final_response_is_read():
    assert (
        final_response("## Thinking\n\nB\n\n## Final Response\n\nC ## Final Response\n\nD") == "D"
    )
    assert final_response("<think>B</think>\nC") == "C"
    assert (
        final_response("## Thinking\n\nThe answer is B")
        == final_response("<think>The answer is B")
        == ""
    )
    assert final_response(" no heading ") == "no heading"


def test_last_claim_counts_and_conflicts_are_reported():
    found = extract("The answer is A. Wait. The answer is C.", FOUR)
    assert (found.letter, found.rule, found.conflicting) == ("C", "statement", True)
    assert not extract("The answer is C. Yes, the answer is C.", FOUR).conflicting


@pytest.mark.parametrize(
    ("output", "rule"),
    [
        ("The answer is B.", "statement"),
        ("B", "letter"),
        ("B. Ceftriaxone", "letter"),
        ("Ceftriaxone", "text"),
        ("None", "none"),
    ],
)
def test_extraction_reports_the_rule(output, rule):
    assert extract(output, FOUR).rule == rule


def test_claimed_letter_precedes_another_options_words():
    assert extract("Amoxicillin is the best choice. The answer is B.", FOUR).letter == "B"


def test_words_shared_by_two_options_are_no_answer():
    options = {"A": "Oculomotor", "B": "Optic", "C": "Oculomotor"}
    assert extract_choice("The answer is oculomotor.", options) is None
    assert extract_choice("The answer is optic.", options) == "B"
    assert extract_choice("C. Oculomotor", options) == "C"


def test_similar_spelling_is_no_answer():
    assert extract_choice("Ceftriaxon", FOUR) is None
    assert extract_choice("Cefotaxime", FOUR) is None


def test_repeated_option_list_is_ignored_but_not_what_follows():
    listed = "The correct answer is one of:\n" + "\n".join(f"{x}. {FOUR[x]}" for x in FOUR)
    assert extract_choice(listed, FOUR) is None
    assert extract_choice(listed + "\n\nB. Ceftriaxone", FOUR) == "B"
    assert extract_choice(listed.replace("one of", "B") + "\n\nAnswer: C", FOUR) == "C"


def test_letter_longer_in_lower_case_shifts_nothing():
    assert extract_choice("İİİİİİİİİİİİ. The answer is (B) Ceftriaxone", FOUR) == "B"
    assert extract_choice("İİİİİİİİİİİİ. The answer is ceftriaxone", FOUR) == "B"


def test_accuracy_counts_no_answer_as_wrong():
    assert accuracy(["A", None, "B", "C"], ["A", "A", "B", "D"]) == 0.5
    with pytest.raises(ValueError, match="as many letters as answers"):
        accuracy(["A"], ["A", "B"])
    with pytest.raises(ValueError, match="at least one"):
        accuracy([], [])


def test_original_drops_empty_answers_and_keeps_the_better_rule():
    outputs = [
        "B is wrong, so A.",
        "",
        "## Thinking\n\nA\n\n## Final Response\n\nB. Not C, not D.",
        "No idea",
    ]
    answers = ["A", "A", "D", "B"]
    readings = [extract_original(output, FOUR) for output in outputs]
    assert readings == [("B", "A"), None, ("B", "D"), (None, None)]
    # by the last option named; the first gives 0 of 3
    assert accuracy_original(readings, answers) == (2 / 3, 3)
    ours = [extract_choice(output, FOUR) for output in outputs]
    assert ours == ["A", None, "B", None]
    assert accuracy(ours, answers) == 1 / 4
