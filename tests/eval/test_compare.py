"""`verippo eval compare`: hand-worked differences, and evaluations of different items."""

from __future__ import annotations

import json
import re

import pytest

from verippo.eval.asked_questions import Answer, list_questions_to_ask
from verippo.eval.config import EvalConfig
from verippo.eval.questions import Question
from verippo.eval.results import item_rows, summarise_evaluation
from verippo.launch import cli

OPTIONS = {"A": "alpha", "B": "beta"}


@pytest.fixture
def evaluated(tmp_path):
    """Writes results in which each item's runs gave these letters; A is right, "-" is a failure."""

    def write(name, letters, *, runs=1, source="demo", start=0, question="Which?", **options):
        config = EvalConfig(
            data="d", output="o", model=name, base_url="http://x/v1", runs=runs, **options
        )
        questions = [
            Question(
                id=f"q{n}",
                source=source,
                question=f"{question} {n}",
                options=OPTIONS,
                gold="A",
                index=n,
                file="f",
            )
            for n in range(start, start + len(letters))
        ]
        cases = list_questions_to_ask(questions, runs=runs, permutations=0, seed=0)
        answers = [
            Answer(error="gone") if x == "-" else Answer(f"The answer is {x}.", "stop", 4)
            for row in letters
            for x in row
        ]
        items = item_rows(questions, cases, answers, config.scoring)
        results = summarise_evaluation(config, items, [], seconds=0.0)
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results, default=vars))
        return str(tmp_path / name)

    return write


def compared(tmp_path, first, second, *options):
    cli.main(["eval", "compare", first, second, "--output", str(tmp_path / "out"), *options])
    return json.loads((tmp_path / "out" / "compare.json").read_text())


def test_difference_and_mcnemar_match_hand_worked_values(evaluated, tmp_path, capsys):
    first, second = (
        evaluated("first", "AAAAAAAABB"),
        evaluated("second", "AABBBBBB-B", temperature=0.0),
    )
    result = compared(tmp_path, first, second)
    demo = result["sources"]["demo"]
    assert [cell["value"] for cell in demo["accuracies"]] == [0.8, 0.2]
    assert demo["difference"]["value"] == pytest.approx(-0.6)
    # resampled means of ten draws of 0 (4 in 10) and -1 (6 in 10): Binomial(10, 0.6), whose
    # 2.5 % and 97.5 % quantiles are 3 and 9
    assert (demo["difference"]["low"], demo["difference"]["high"]) == (
        pytest.approx(-0.9),
        pytest.approx(-0.3),
    )
    assert (demo["only_first"], demo["only_second"], demo["p_value"]) == (
        6,
        0,
        pytest.approx(2 / 2**6),
    )
    assert result["left_out"] == [0, 0]
    assert result["settings"] == {"model": ["first", "second"], "temperature": [0.5, 0.0]}
    printed = capsys.readouterr().out
    assert "left out" not in printed
    assert re.search(
        r"^demo +10 +80.0% +20.0% +-60.0 +\(-90.0 to -30.0\) +6 +0 +0.0312$", printed, re.MULTILINE
    )
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count('data-outcome="only first right"') == 6
    assert page.count('<details class="card item"') == 6
    assert "first: A; second: B; right: A" in page


def test_difference_averages_runs_and_mcnemar_uses_their_majority(evaluated, tmp_path):
    first = evaluated("first", ["AAB", "BBA", "BBB"], runs=3)  # means 2/3, 1/3, 0; votes A, B, B
    second = evaluated("second", ["AAA", "AAB", "B--"], runs=3)  # means 1, 2/3, 0; votes A, A, B
    demo = compared(tmp_path, first, second)["sources"]["demo"]
    assert [cell["value"] for cell in demo["accuracies"]] == pytest.approx([1 / 3, 5 / 9])
    assert demo["difference"]["value"] == pytest.approx(2 / 9)
    assert (demo["only_first"], demo["only_second"], demo["p_value"]) == (0, 1, 1.0)


def test_only_shared_items_count_and_others_are_reported(evaluated, tmp_path, capsys):
    first, second = evaluated("first", "AAAAB"), evaluated("second", "BAA", start=3)
    result = compared(tmp_path, first, second)
    assert (result["shared"], result["left_out"]) == (2, [3, 1])
    assert [cell["value"] for cell in result["sources"]["demo"]["accuracies"]] == [0.5, 0.5]
    assert (
        f"left out: 3 items of {first} that the other does not have (2 are shared)"
        in capsys.readouterr().out
    )
    assert (
        "3 of the first and 1 of the second evaluation are left out"
        in (tmp_path / "out" / "compare.html").read_text()
    )


def test_items_are_matched_whatever_their_order(evaluated, tmp_path):
    first, second = evaluated("first", "AAB"), evaluated("second", "ABB")
    path = tmp_path / "second" / "results.json"
    results = json.loads(path.read_text())
    items = [
        item | {"id": f"demo-{n}", "index": n} for n, item in enumerate(reversed(results["items"]))
    ]
    path.write_text(json.dumps(results | {"items": items}))
    result = compared(tmp_path, first, second)
    assert (result["shared"], result["left_out"]) == (3, [0, 0])
    assert (result["sources"]["demo"]["only_first"], result["sources"]["demo"]["only_second"]) == (
        1,
        0,
    )


def test_items_of_equal_id_but_other_text_are_not_matched(evaluated, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        compared(
            tmp_path, evaluated("first", "AB"), evaluated("second", "AB", question="Which other?")
        )
    assert caught.value.code == 2
    assert "share no item: evaluate both on the same --data" in capsys.readouterr().err


def test_files_that_are_no_evaluation_are_refused(evaluated, tmp_path, capsys):
    (tmp_path / "results.json").write_text("[1]")
    for path, message in (
        ("nowhere", "No such file"),
        (str(tmp_path), "not the results.json of `verippo eval`"),
    ):
        with pytest.raises(SystemExit) as caught:
            compared(tmp_path, evaluated(f"first-{len(path)}", "A"), path)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_another_comparison_asks_for_another_folder(evaluated, tmp_path, capsys):
    first, second, third = (evaluated(name, "AB") for name in ("first", "second", "third"))
    compared(tmp_path, first, second)
    written = (tmp_path / "out" / "compare.json").read_bytes()
    compared(tmp_path, first, second)
    for others in ((first, third), (first, second, "--scoring", "original")):
        with pytest.raises(SystemExit) as caught:
            compared(tmp_path, *others)
        assert caught.value.code == 2
    error = capsys.readouterr().err
    assert (
        f"holds another comparison (second {second} -> {third}): choose another --output" in error
    )
    assert "scoring strict_cascade -> original" in error
    assert (tmp_path / "out" / "compare.json").read_bytes() == written
