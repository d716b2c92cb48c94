"""Share of outputs that are read as a careful person reads them.

The reader was developed on the outputs of the first file. Those of the second one were written
before it and are not to be used for development: they measure how it does on other wordings.
"""

from __future__ import annotations

import json
import operator
from pathlib import Path

import pytest

from verippo.eval.score import extract, extract_choice, final_response

FOUR = {"A": "Aspirin", "B": "Beta blocker", "C": "Warfarin", "D": "Vitamin K"}


def load(name):
    """(kind, options, letter, output) of each row."""
    found = json.loads((Path(__file__).parent / name).read_text("utf-8"))
    return [
        (row["kind"], found["options"][row["options"]], row["letter"], row["output"])
        for row in found["outputs"]
    ]


DEVELOPMENT = load("outputs_development.json")
HELD_OUT = load("outputs_heldout.json")
# known to be misread, always as no answer
MISREAD = {
    "thats c for sure",
    "E / e",
    "C or rather c",
    "the best answer would be a",
    "I considered D and even wrote it down first, yet the low ferritin settles it: A.",
    "The only option not ruled out is C.",
    "D... no wait, A!",
    "Minimal change ❌ | Membranous ❌ | **C. IgA nephropathy** ✅ | Lupus ❌",
    "You should give intramuscular adrenaline (A) first; oral antihistamines (B) are only adjuncts.",
    "患者皮肤青铜色,血糖升高,铁蛋白3000。A项ALT常明显升高;B项有大量饮酒史;C项多见于青年女性。"
    "D项可解释全部表现,为正确答案。",
}


@pytest.mark.parametrize("rows", [DEVELOPMENT, HELD_OUT])
def test_sets_cover_every_kind_and_share_no_output(rows):
    assert len({kind for kind, _, _, _ in rows}) >= 15
    assert all(letter is None or letter in options for _, options, letter, _ in rows)
    assert sum(letter is None for _, _, letter, _ in rows) >= 20
    assert not {row[3] for row in DEVELOPMENT} & {row[3] for row in HELD_OUT}


def test_development_outputs_are_read_as_a_person_reads_them():
    missed = {
        output: found
        for _, options, letter, output in DEVELOPMENT
        if (found := extract_choice(output, options)) != letter
    }
    assert missed == dict.fromkeys(MISREAD)


def test_share_of_heldout_outputs_read_as_a_person_reads_them():
    found = [extract_choice(output, options) for _, options, _, output in HELD_OUT]
    letters = [letter for _, _, letter, _ in HELD_OUT]
    num_right = sum(map(operator.eq, found, letters))
    invented = [
        output
        for (_, _, letter, output), choice in zip(HELD_OUT, found, strict=True)
        if letter is None and choice
    ]
    print(f"held-out: {num_right} of {len(HELD_OUT)} right, {len(invented)} invented")
    assert num_right >= 105
    assert len(invented) <= 1


@pytest.mark.parametrize(
    ("output", "letter", "rule"),
    [
        ('{"answer": "B", "explanation": "A is correct in children."}', "B", "statement"),
        (r"\boxed{B} is my choice. C is the right answer in children.", "B", "statement"),
        ("The answer is B. On second thought, C.", "C", "statement"),
        ("B", "B", "letter"),
        ("A, C and D can be ruled out.", "B", "elimination"),
        ("Warfarin", "C", "text"),
        ("The answer is B or C.", None, "statement"),
        ("Both B and C are reasonable.", None, "none"),
        ("Let us see.", None, "none"),
    ],
)
def test_evidence_is_taken_in_order(output, letter, rule):
    found = extract(output, FOUR)
    assert (found.letter, found.rule) == (letter, rule)


def test_thought_without_final_heading_is_read_only_when_it_concludes():
    thought = "## Thinking\n\nThe INR is 9.\n\n"
    assert extract_choice(thought + "The answer is D.", FOUR) == "D"
    assert extract_choice(thought + "The answer may be D because", FOUR) is None
    assert extract_choice("## Thinking\n\nThe answer is D.", FOUR) is None
    assert final_response(thought + "The answer is D.") == ""


def test_a_question_that_the_model_made_up_is_not_read():
    run_on = "Question: Which drug lowers fever?\nA. Aspirin\nB. Heparin\nAnswer: A"
    assert extract_choice(f"The answer is C.\n\n{run_on}", FOUR) == "C"
    assert extract_choice(run_on, FOUR) == "A"


def test_list_cut_before_its_last_option_eliminates_nothing():
    cut = "Option A is incorrect.\nOption B is incorrect.\nOption C is incorrect."
    assert extract_choice(cut, FOUR) is None
    assert extract_choice(cut.replace("\n", " "), FOUR) == "D"


def test_genus_may_be_abbreviated():
    options = {"A": "Clostridioides difficile", "B": "Escherichia coli", "C": "Bacillus cereus"}
    assert extract_choice("The most likely organism is E. coli.", options) == "B"
    assert extract_choice("B. cereus", options) == "C"
    assert extract_choice("B. fragilis grew in the wound.", options) is None
