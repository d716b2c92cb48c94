"""The generated score sums, checked against a second writing of the published criteria."""

import collections
import hashlib
import itertools
import json
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verippo.search.bedside_scores import IRRELEVANT, SCORES
from verippo.search.calculations import generate, paraphrases, split_of, wrong_answers

KINDS = tuple(SCORES)


def band(cuts, points):
    """points[i] for a number below cuts[i] and at or above the cut before."""
    return lambda text: points[sum(float(text) >= cut for cut in cuts)]


# A finding's words -> points, or a measurement's cut-offs (a value at a cut belongs above it).
CRITERIA = {
    "apgar": {
        "skin pink": 2,
        "limbs blue": 1,
        "skin blue": 0,
        "pulse": band([100], [1, 2]),
        "pulse none": 0,
        "reflex cough": 2,
        "reflex grimace": 1,
        "reflex none": 0,
        "tone active": 2,
        "tone flexion": 1,
        "tone limp": 0,
        "breathing strong": 2,
        "breathing slow": 1,
        "breathing none": 0,
    },
    "child_pugh": {
        "bilirubin": band([2, 3.01], [1, 2, 3]),
        "albumin": band([2.8, 3.51], [3, 2, 1]),
        "prothrombin": band([4, 6.01], [1, 2, 3]),
        "encephalopathy": band([1, 3], [1, 2, 3]),
        "no ascites": 1,
        "slight ascites": 2,
        "moderate ascites": 3,
    },
    "bishop": {
        "dilation": band([1, 3, 5], [0, 1, 2, 3]),
        "effacement": band([40, 60, 80], [0, 1, 2, 3]),
        "station": band([-2, -1, 1], [0, 1, 2, 3]),
        "cervix firm": 0,
        "cervix medium": 1,
        "cervix soft": 2,
        "cervix posterior": 0,
        "cervix middle": 1,
        "cervix anterior": 2,
    },
}


def points_by_criteria(kind, finding):
    if finding in {irrelevant.text for irrelevant in IRRELEVANT}:
        return 0
    criteria = CRITERIA[kind]
    if finding in criteria:
        return criteria[finding]
    name, value = finding.rsplit(" ", 1)
    return criteria[name](value)


def score(kind, *findings):
    """The total by the code's tables."""
    points = {
        finding.text: finding.points
        for item in SCORES[kind].items
        for level in item
        for finding in level
    }
    return sum(points[finding] for finding in findings)


def canonical(record):
    irrelevant = {finding.text for finding in IRRELEVANT}
    return record["kind"], frozenset(record["inputs"]["findings"]) - irrelevant


def tokens(record):
    """Words, single digits and punctuation."""
    text = f"{record['Question']} {record['Complex_CoT']} {record['Response']}"
    return re.findall(r"\d|[^\W\d_]+|[^\w\s]", text)


def made(num, *, seed=0, split="train", kinds=KINDS, difficulty=6):
    return generate(num, seed=seed, split=split, kinds=kinds, difficulty=difficulty)


def test_every_finding_has_the_points_of_the_published_criteria():
    assert set(CRITERIA) == set(SCORES)
    for kind, one in SCORES.items():
        for finding in (finding for item in one.items for level in item for finding in level):
            assert finding.points == points_by_criteria(kind, finding.text), (kind, finding)


def test_scores_reach_their_published_range():
    ranges = {
        kind: tuple(sum(item[end][0].points for item in one.items) for end in (0, -1))
        for kind, one in SCORES.items()
    }
    assert ranges == {"apgar": (0, 10), "child_pugh": (5, 15), "bishop": (0, 13)}


def test_levels_rise_and_words_are_unique_within_a_score():
    for one in SCORES.values():
        for item in one.items:
            points = [level[0].points for level in item]
            assert points == sorted(set(points))
            assert all(len({finding.points for finding in level}) == 1 for level in item)
        findings = [finding for item in one.items for level in item for finding in level]
        texts = [finding.text for finding in [*findings, *IRRELEVANT]]
        assert len(set(texts)) == len(texts)


def test_score_totals_of_hand_worked_patients():
    # acrocyanosis 1, pulse 2, grimace 1, some flexion 1, strong cry 2
    apgar = ("limbs blue", "pulse 130", "reflex grimace", "tone flexion", "breathing strong")
    assert score("apgar", *apgar) == 7
    # bilirubin 2, albumin 3, slight ascites 2, no encephalopathy 1, 5 s 2: class C begins at 10
    child_pugh = ("bilirubin 2.4", "albumin 2.4", "slight ascites", "encephalopathy 0")
    assert score("child_pugh", *child_pugh, "prothrombin 5") == 10
    # 3 cm 2, 70 % 2, station -1 2, soft 2, mid-position 1
    bishop = ("dilation 3", "effacement 70", "station -1", "cervix soft", "cervix middle")
    assert score("bishop", *bishop) == 9


@pytest.mark.parametrize("split", ["train", "eval"])
def test_answers_equal_the_sum_of_published_points(split):
    for record in made(400, seed=1, split=split):
        findings = record["inputs"]["findings"]
        points = [points_by_criteria(record["kind"], finding) for finding in findings]
        assert record["Ground-True Answer"] == str(sum(points))


def test_reasoning_restates_each_finding_with_points_and_running_total():
    for record in made(500, seed=3):
        name, _, listed = record["Question"].partition(" : ")
        findings = listed.removesuffix(" , total ?").split(" , ")
        assert findings == record["inputs"]["findings"]
        assert name == SCORES[record["kind"]].name
        total = 0
        for finding, step in zip(findings, record["Complex_CoT"].split(" ; "), strict=True):
            restated, points, running = re.fullmatch(r"(.+) = (\d) , total (\d+)", step).groups()
            total += int(points)
            assert restated == finding
            assert int(points) == points_by_criteria(record["kind"], finding)
            assert int(running) == total
        assert record["Response"] == record["Ground-True Answer"] == str(total)


def test_records_have_the_published_keys_and_survive_json():
    for record in made(100):
        assert json.loads(json.dumps(record)) == record
        assert record["Open-ended Verifiable Question"] == record["Question"]
        assert {"Question", "Complex_CoT", "Response", "Ground-True Answer"} < record.keys()
        assert all(isinstance(record[key], str) and record[key] for key in list(record)[:5])
        assert re.search(r", (19|20)\d\d\b", record["source"])
        assert "##" not in record["Question"] + record["Complex_CoT"] + record["Response"]


def test_the_records_of_the_demo_are_those_of_its_published_figures():
    digest = hashlib.sha256()
    for seed, split, difficulty in itertools.product(range(3), ("train", "eval"), (3, 4, 6)):
        for n, record in enumerate(made(200, seed=seed, split=split, difficulty=difficulty)):
            row = [record, paraphrases(record), wrong_answers(record, 2, seed + n)]
            digest.update(json.dumps(row).encode())
    assert digest.hexdigest() == (
        "3d5bbdfe100dc073eef02c1c7ea55c0b033d8f2e0a9cb6d41816592b4624d4f0"
    )


def test_train_and_held_out_share_no_problem_whatever_the_seed():
    train = {
        canonical(record)
        for seed, difficulty in [(0, 6), (1, 6), (2, 3), (3, 8)]
        for record in made(1000, seed=seed, difficulty=difficulty)
    }
    held_out = {
        canonical(record)
        for seed, difficulty in [(0, 6), (9, 6), (2, 3)]
        for record in made(500, seed=seed, split="eval", difficulty=difficulty)
    }
    assert len(held_out) > 300
    assert not train & held_out


@settings(max_examples=50)
@given(
    st.permutations(["dilation 3", "station -1", "cervix soft"]),
    st.sampled_from(["brown eyes", "dark hair", "born in May"]),
)
def test_split_ignores_order_and_irrelevant_findings(findings, irrelevant):
    expected = split_of("bishop", ["dilation 3", "station -1", "cervix soft"])
    assert split_of("bishop", [irrelevant, *findings]) == expected


def test_about_one_problem_in_ten_is_held_out():
    levels = [[f.text for level in item for f in level] for item in SCORES["child_pugh"].items]
    splits = [split_of("child_pugh", findings) for findings in itertools.product(*levels)]
    assert 0.085 < splits.count("eval") / len(splits) < 0.115


def test_a_record_depends_on_its_index_and_not_on_how_many_are_asked_for():
    arguments = {"seed": 7, "split": "eval", "kinds": ["apgar", "bishop"], "difficulty": 5}
    hundred = generate(100, **arguments)
    assert generate(30, **arguments) == hundred[:30]
    assert generate(100, **arguments | {"kinds": ["bishop", "apgar"]}) == hundred
    assert generate(100, **arguments | {"seed": 8}) != hundred


def test_records_are_the_same_in_another_process():
    command = (
        "import json; from verippo.search.calculations import generate;"
        f"print(json.dumps(generate(20, seed=11, split='train', kinds={KINDS}, difficulty=6)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True
    )
    assert json.loads(ran.stdout) == made(20, seed=11)


@pytest.mark.parametrize("difficulty", [3, 5, 8])
@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_score_has_problems_of_every_difficulty_in_both_splits(kind, split, difficulty):
    for record in made(3, split=split, kinds=[kind], difficulty=difficulty):
        assert (record["kind"], record["split"]) == (kind, split)
        assert len(record["inputs"]["findings"]) == record["difficulty"] == difficulty


@pytest.mark.parametrize("split", ["train", "eval"])
def test_no_total_pays_for_guessing(split):
    records = made(3000, seed=13, split=split)
    totals = collections.Counter(record["Ground-True Answer"] for record in records)
    assert max(totals.values()) / len(records) < 0.16


def test_records_are_short_and_their_vocabulary_is_small_and_closed():
    train = made(4000, seed=14)
    vocabulary = {token for record in train for token in tokens(record)}
    assert len(vocabulary) < 200
    held_out = made(500, seed=15, split="eval")
    assert {token for record in held_out for token in tokens(record)} <= vocabulary
    for record in train:
        assert len(tokens(record)) < 100
        assert 1 <= len(record["Response"]) <= 2


def test_wrong_answers_are_distinct_and_never_right():
    for record in made(150, seed=16):
        wrong = wrong_answers(record, 15, seed=0)
        assert len(set(wrong)) == len(wrong) == 15
        numbers = [re.search(r"-?\d+", answer).group() for answer in wrong]
        assert all(int(number) >= 0 for number in numbers)
        assert record["Ground-True Answer"] not in numbers
        assert wrong == wrong_answers(record, 15, seed=0)
        assert wrong != wrong_answers(record, 15, seed=1)


def test_wrong_answers_contain_typical_slips():
    record = next(
        record for record in made(100, kinds=["child_pugh"]) if record["Ground-True Answer"] == "12"
    )
    numbers = {re.search(r"\d+", answer).group() for answer in wrong_answers(record, 5, seed=0)}
    assert numbers == {"10", "11", "13", "14", "21"}


def test_wrong_and_right_answers_use_the_same_phrases():
    shapes = {True: set(), False: set()}
    for record in made(60, seed=17):
        shapes[True] |= {re.sub(r"\d+", "#", answer) for answer in paraphrases(record)}
        wrong = wrong_answers(record, 4, seed=0)
        shapes[False] |= {re.sub(r"\d+", "#", answer) for answer in wrong}
    assert shapes[True] == shapes[False]


def test_paraphrases_state_the_right_answer_and_begin_with_the_response():
    for record in made(100, seed=18):
        phrases = paraphrases(record)
        assert phrases[0] == record["Response"]
        assert len(set(phrases)) == len(phrases) >= 3
        assert all(record["Ground-True Answer"] in phrase for phrase in phrases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split='test'"),
        ({"kinds": ["apgar", "astrology"]}, "astrology"),
        ({"kinds": []}, "kinds"),
        ({"difficulty": 2}, "difficulty=2"),
        ({"difficulty": 9}, "difficulty=9"),
    ],
)
def test_unknown_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        made(1, **arguments)
