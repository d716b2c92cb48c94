"""The evaluation file format, malformed items, and permuted options."""

from __future__ import annotations

import json
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verippo.eval.questions import Question, load_questions, permute_options

GOOD = {
    "question": "Which drug?",
    "options": {"A": "Aspirin", "B": "Heparin"},
    "answer_idx": "B",
    "answer": "Heparin",
}
FAULTS = {
    "is list, expected an object": ["a question"],
    "its question is missing or empty": GOOD | {"question": "  "},
    "has no options": {key: GOOD[key] for key in ("question", "answer_idx")},
    "has no options:": GOOD | {"options": ["Aspirin", "Heparin"]},
    "has 1 options, expected 2 to 14": GOOD | {"options": {"B": "Heparin"}},
    "has 15 options, expected 2 to 14": GOOD
    | {"options": dict.fromkeys(string.ascii_uppercase[:15], "x")},
    "option 'b': expected a letter from A to Z": GOOD
    | {"options": {"A": "Aspirin", "b": "Heparin"}},
    "option A is None, expected text": GOOD | {"options": {"A": None, "B": "Heparin"}},
    "option A is ' ', expected text": GOOD | {"options": {"A": " ", "B": "Heparin"}},
    "contains an unpaired surrogate": GOOD | {"options": {"A": "half \ud800", "B": "Heparin"}},
    "answer_idx 'C' is not among the options A, B": GOOD | {"answer_idx": "C"},
    "answer_idx None is not among the options A, B": GOOD | {"answer_idx": None},
    "answer_idx 1 is not among the options A, B": GOOD | {"answer_idx": 1},
    "answer is int, expected text": GOOD | {"answer": 3},
    "answer_idx B and answer 'Aspirin' name different options": GOOD | {"answer": "Aspirin"},
    "answer_idx B and answer 'A' name different options": GOOD | {"answer": "A"},
}


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def question(num):
    options = dict(zip(string.ascii_uppercase, (f"option {n}" for n in range(num)), strict=False))
    return Question(
        id="q", source="s", question="?", options=options, gold="B", index=0, file="f.json"
    )


def test_published_files_load_completely(shared):
    files = sorted((shared / "data").glob("*.json"))
    questions, bad = load_questions(",".join(map(str, files)))
    assert len(questions) >= 3457
    assert not bad
    assert {len(q.options) for q in questions} == {3, 4, 5, 10}
    assert all(q.gold in q.options for q in questions)
    assert len({(q.source, q.id) for q in questions}) == len(questions)


def test_sources_are_keys_and_lists_are_named_after_their_file(tmp_path):
    first = write(tmp_path / "a.json", {"MedQA": [GOOD, GOOD | {"id": 7}], "PubMedQA": [GOOD]})
    second = write(tmp_path / "b.json", [GOOD])
    questions, _ = load_questions(f"{first}, {second}")
    assert [(q.source, q.id, q.index, q.file) for q in questions] == [
        ("MedQA", "MedQA-0", 0, first),
        ("MedQA", "7", 1, first),
        ("PubMedQA", "PubMedQA-0", 0, first),
        ("b", "b-0", 0, second),
    ]
    assert questions[0].options == GOOD["options"]


def test_json_lines_load_as_a_list(tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "\n")
    assert [q.id for q in load_questions(str(tmp_path / "c.jsonl"))[0]] == ["c-0", "c-1"]


def test_limit_takes_the_first_items_of_each_source(tmp_path):
    path = write(tmp_path / "a.json", {"x": [GOOD] * 3, "y": [GOOD] * 2})
    assert [q.id for q in load_questions(path, limit=2)[0]] == ["x-0", "x-1", "y-0", "y-1"]


def test_ids_are_unique_when_a_source_is_in_two_files(tmp_path):
    paths = [write(tmp_path / name, {"x": [GOOD, GOOD]}) for name in ("a.json", "b.json")]
    assert [q.id for q in load_questions(",".join(paths))[0]] == ["x-0", "x-1", "x-2", "x-3"]


@pytest.mark.parametrize("fault", FAULTS)
def test_malformed_items_are_named_by_file_and_position(tmp_path, fault):
    path = write(tmp_path / "e.json", {"src": [GOOD, FAULTS[fault], GOOD]})
    questions, bad = load_questions(path)
    assert [q.index for q in questions] == [0, 2]
    assert len(bad) == 1
    assert bad[0].startswith(f"{path}: src item 1: {fault}")
    assert "\n" not in bad[0]


def test_null_id_counts_as_missing(tmp_path):
    questions, bad = load_questions(write(tmp_path / "e.json", {"x": [GOOD | {"id": None}] * 2}))
    assert ([question.id for question in questions], bad) == (["x-0", "x-1"], [])


def test_second_use_of_an_id_is_malformed(tmp_path):
    path = write(
        tmp_path / "e.json",
        {"x": [GOOD | {"id": "1"}, GOOD | {"id": 1}], "y": [GOOD | {"id": "1"}]},
    )
    questions, bad = load_questions(path)
    assert [(q.source, q.index) for q in questions] == [("x", 0), ("y", 0)]
    assert bad == [f"{path}: x item 1: id '1' is used twice"]


def test_all_malformed_items_are_listed(tmp_path):
    path = write(tmp_path / "e.json", {"src": [*FAULTS.values(), GOOD]})
    assert len(load_questions(path)[1]) == len(FAULTS)


def test_answer_that_is_no_option_gives_a_warning(tmp_path):
    path = write(tmp_path / "e.json", {"src": [GOOD, GOOD | {"answer": "unfractionated heparin"}]})
    with pytest.warns(UserWarning, match=re.escape(f"{path}: src item 1") + r".*1 such items"):
        questions, bad = load_questions(path)
    assert (questions[1].gold, bad) == ("B", [])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("answer", [None, "", "heparin ", "B"])
def test_matching_or_missing_answers_give_no_warning(tmp_path, answer):
    assert load_questions(write(tmp_path / "e.json", [GOOD | {"answer": answer}]))[0][0].gold == "B"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ('{"src": {"question": "?"}}', "expected"),
        ("3", "expected"),
        ("[]", "holds no questions"),
        ('{"src": []}', "holds no questions"),
    ],
)
def test_files_without_questions_are_refused_by_name(tmp_path, text, says):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(ValueError, match=rf"f\.json.*{says}"):
        load_questions(str(tmp_path / "f.json"))


def test_missing_files_and_stray_commas_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_questions(str(tmp_path / "absent.json"))
    with pytest.raises(ValueError, match="stray comma"):
        load_questions(write(tmp_path / "a.json", [GOOD]) + ",")


@given(num=st.integers(2, 14), seed=st.integers())
def test_permuted_options_keep_the_correct_text(num, seed):
    own = question(num)
    shown, back = permute_options(own, seed)
    assert list(shown.options) == list(own.options)
    assert {letter: own.options[back[letter]] for letter in shown.options} == shown.options
    assert back[shown.gold] == own.gold
    assert (shown, back) == permute_options(own, seed)


def test_permutations_place_the_answer_uniformly():
    places = [permute_options(question(4), seed)[0].gold for seed in range(4000)]
    assert all(900 < places.count(letter) < 1100 for letter in "ABCD")
