"""The search against a scripted model: what it asks, in which order, how often; what it writes."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from verippo.core.llm.journal import content_key
from verippo.core.text.chat import parse_response, render_response
from verippo.core.text.data import ANSWER_KEY, QUESTION_KEY
from verippo.core.training.pretrained import load_tokenizer
from verippo.sft.conversations import read_conversation
from verippo.sft.examples import load_examples
from verippo.sft.verifier_examples import load_answers

FIRST = ["correction", "exploring_new_paths", "verification"]
ALL = ["backtracking", *FIRST]


def drawn(question: str, answer: str, attempt: int, depth: int, *, seed: int = 0) -> str:
    """The strategy of a place in the search, by the documented rule: it depends on (seed, problem,
    attempt, depth) alone."""
    rng = random.Random(f"{seed}/{content_key(question, answer)}/{attempt}/{depth}")
    return rng.choice(FIRST if depth == 1 else ALL)


@pytest.fixture
def searched(llm_server, doctor, command, scripted):
    """Searches problems of which number n has `plan[n]` wrong conclusions first: (records, given
    up, doctor, server)."""

    def run(plan, *, faults=None, **options):
        rows = [scripted.problem(n) for n in range(len(plan))]
        answers = {row[QUESTION_KEY]: row[ANSWER_KEY] for row in rows}
        model = doctor(answers, dict(zip(answers, plan, strict=True)))
        model.faults = faults or {}
        server = llm_server(model)
        folder = command("search", rows, server, **options)
        return (
            scripted.load(folder, "search.json"),
            scripted.load(folder, "given_up.json"),
            model,
            server,
        )

    return run


def test_a_right_first_conclusion_takes_five_calls(searched, scripted):
    (record,), given_up, model, server = searched([0])
    assert given_up == []
    assert model.log == {
        "What ails patient 0?": ["chain", "monologue", "response"],
        "disease 0": ["verdict"],
        "It is disease 0.": ["verdict"],
    }
    assert record == {
        "id": 0,
        QUESTION_KEY: "What ails patient 0?",
        ANSWER_KEY: "disease 0",
        "Question": "What ails patient 0?",
        "Complex_CoT": "Hmm.\n\nWhat speaks for disease 0?\n\ndisease 0\n\ndisease 0 fits.\n\n"
        + scripted.PONDERING,
        "Response": "It is disease 0.",
        "trajectory": record["trajectory"],
    }
    assert list(record)[-4:] == ["Question", "Complex_CoT", "Response", "trajectory"]
    first, *texts = record["trajectory"]
    assert [step["strategy"] for step in record["trajectory"]] == [
        "initial",
        "monologue",
        "response",
    ]
    assert (first["attempt"], first["depth"], first["conclusion"], first["verdict"]) == (
        0,
        0,
        "disease 0",
        True,
    )
    assert [step["action"] for step in first["chain"]] == [
        "Inner Thinking",
        "Final Conclusion",
        "Verification",
    ]
    calls = [call for step in record["trajectory"] for call in step["calls"]]
    assert [call["prompt"] for call in calls] == [
        "chain",
        "verdict",
        "monologue",
        "response",
        "verdict",
    ]
    assert texts[-1]["verdict"] is True
    assert [body["temperature"] for body in server.bodies] == [
        1.0,
        0.0,
        1.0,
        1.0,
        0.0,
    ]  # verdicts are not drawn
    by_hash = {content_key(body["messages"][0]["content"]): body for body in server.bodies}
    assert [call["hash"] for call in calls] == list(by_hash)
    assert [call["prompt_tokens"] for call in calls] == [
        len(b["messages"][0]["content"].split()) for b in by_hash.values()
    ]
    assert texts[-1]["calls"][0]["completion_tokens"] == 4  # It is disease 0.


@pytest.mark.parametrize("wrong", [1, 2, 3])
def test_each_wrong_conclusion_costs_one_strategy_and_one_verdict(searched, scripted, wrong):
    (record,), _, model, server = searched([wrong])
    assert len(server.bodies) == 5 + 2 * wrong
    question, answer = record[QUESTION_KEY], record[ANSWER_KEY]
    strategies = [drawn(question, answer, 1, depth) for depth in range(1, wrong + 1)]
    assert model.log[question] == ["chain", *strategies, "monologue", "response"]
    steps = record["trajectory"][:-2]
    assert [step["strategy"] for step in steps] == ["initial", *strategies]
    assert [step["verdict"] for step in steps] == [False] * wrong + [True]
    assert [step["attempt"] for step in steps] == [0] + [1] * wrong
    assert [step["depth"] for step in steps] == list(range(wrong + 1))
    # each continuation's Verification takes the place of the one that it doubts
    doubts = "".join(
        f"\n\nWhat speaks for wrong guess {n} at {question}?\n\nwrong guess {n} at {question}"
        "\n\nIs that so?"
        for n in range(wrong)
    )
    assert (
        record["Complex_CoT"]
        == f"Hmm.{doubts}\n\nWhat speaks for {answer}?\n\n{answer}\n\n{answer} fits.\n\n"
        + scripted.PONDERING
    )


def test_all_attempts_start_from_the_one_initial_chain_and_the_label_ends_them(searched):
    (record,), _, model, server = searched([99])
    question, answer = record[QUESTION_KEY], record[ANSWER_KEY]
    strategies = [
        drawn(question, answer, attempt, depth) for attempt in (1, 2, 3) for depth in (1, 2, 3)
    ]
    assert model.log[question] == ["chain", *strategies, "label_guided", "monologue", "response"]
    assert not {"backtracking"} & {strategies[0], strategies[3], strategies[6]}
    places = [(step["attempt"], step["depth"]) for step in record["trajectory"][:-2]]
    assert places == [
        (0, 0),
        *((attempt, depth) for attempt in (1, 2, 3) for depth in (1, 2, 3)),
        (4, 1),
    ]
    # the scripted model counts wrong conclusions along the chain: 0, then 1, 2, 3 in each attempt;
    # each is judged once
    guesses = [step["conclusion"].split(" at ")[0] for step in record["trajectory"][:-3]]
    assert guesses == ["wrong guess 0", *["wrong guess 1", "wrong guess 2", "wrong guess 3"] * 3]
    assert {topic: kinds for topic, kinds in model.log.items() if topic != question} == {
        **{f"wrong guess {n} at {question}": ["verdict"] for n in range(4)},
        answer: ["verdict"],
        f"It is {answer}.": ["verdict"],
    }
    assert len(server.bodies) == 1 + 9 + 1 + 2 + 6


def test_without_the_label_an_unsolved_problem_is_given_up_and_keeps_its_trajectory(
    searched, tmp_path
):
    records, given_up, model, server = searched(
        [0, 99, 1], label_guided="false", max_attempts=2, max_depth=1
    )
    assert [row["id"] for row in records] == [0, 2]
    assert [row["id"] for row in given_up] == [1]
    assert [step["verdict"] for step in given_up[0]["trajectory"]] == [False, False, False]
    assert not any("label_guided" in kinds for kinds in model.log.values())
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| solved: initial | 1 |" in report
    assert "| given up | 1 |" in report
    assert "| all | 3 |" in report
    assert "| True | 2 |\n| False | 4 |\n| unparsed | 0 |" in report


def test_depth_zero_tries_no_strategy(searched):
    _, given_up, model, _ = searched([1], label_guided="false", max_depth=0)
    assert model.log[given_up[0][QUESTION_KEY]] == ["chain"]


def test_draws_depend_on_the_seed_and_on_the_problem_not_on_its_place(
    searched, llm_server, doctor, command, scripted
):
    plan = [3] * 24
    records = searched(plan)[0]
    again = searched(plan, output="again", seed=1)[0]
    strategies = [[step["strategy"] for step in record["trajectory"][1:-2]] for record in records]
    assert strategies == [
        [drawn(r[QUESTION_KEY], r[ANSWER_KEY], 1, depth) for depth in (1, 2, 3)] for r in records
    ]
    assert "backtracking" not in {row[0] for row in strategies}
    assert strategies != [
        [step["strategy"] for step in record["trajectory"][1:-2]] for record in again
    ]
    counts = Counter(name for row in strategies for name in row)
    assert all(counts[name] > 6 for name in ALL)
    rows = [scripted.problem(n) for n in reversed(range(8))]
    answers = {row[QUESTION_KEY]: row[ANSWER_KEY] for row in rows}
    folder = command(
        "search", rows, llm_server(doctor(answers, dict.fromkeys(answers, 3))), output="reversed"
    )
    reversed_ = {record["id"]: record for record in scripted.load(folder, "search.json")}
    assert all(reversed_[n] == records[n] for n in range(8))


def test_equal_problems_are_searched_once_and_each_row_keeps_its_own_keys(
    llm_server, doctor, command, scripted
):
    rows = [scripted.problem(0) | {"id": place} for place in ("a", "b")]
    server = llm_server(doctor({"What ails patient 0?": "disease 0"}, {"What ails patient 0?": 1}))
    records = scripted.load(command("search", rows, server), "search.json")
    assert [record["id"] for record in records] == ["a", "b"]
    assert records[0]["trajectory"] == records[1]["trajectory"]
    assert len(server.bodies) == 7


def test_the_output_trains_stage_1_and_its_verdicts_train_the_verifier(
    searched, tmp_path, tokenizer_folder
):
    records, given_up, _, _ = searched([0, 2, 99], label_guided="false")
    tokenizer = load_tokenizer(str(tokenizer_folder))
    examples = load_examples(
        str(tmp_path / "out" / "search.json"), tokenizer, limit=None, system=None, workers=1
    )
    for record, example in zip(records, examples, strict=True):
        target = render_response(record["Complex_CoT"], record["Response"])
        assert tokenizer.decode(example.response_ids, skip_special_tokens=True) == target
        assert parse_response(target) == (record["Complex_CoT"], record["Response"])
    sources = f"{tmp_path}/out/search.json,{tmp_path}/out/given_up.json"
    answers, kinds = load_answers(sources, limit=None, seed=0, wrong_per_question=1)
    assert kinds == {"search record": 3}
    assert [(a.response.split(" at ")[0], a.reference, a.label) for a in answers][:4] == [
        ("disease 0", "disease 0", True),
        ("wrong guess 0", "disease 1", False),
        ("wrong guess 1", "disease 1", False),
        ("disease 1", "disease 1", True),
    ]
    assert len(answers) == 1 + 3 + 10


def test_the_papers_baselines_are_cut_from_each_record(searched, tmp_path, scripted):
    searched([1])
    (simple,), (no,) = (
        scripted.load(tmp_path / "out", f"search_{kind}_cot.json") for kind in ("simple", "no")
    )
    question = "What ails patient 0?"
    assert simple == {
        "id": 0,
        QUESTION_KEY: question,
        ANSWER_KEY: "disease 0",
        "Question": question,
        "Complex_CoT": f"What speaks for wrong guess 0 at {question}?",
        "Response": f"wrong guess 0 at {question}",
    }
    assert (no["Complex_CoT"], no["Response"]) == ("", "It is disease 0.")
    assert (
        read_conversation(no, where="here").turns[1]["content"]
        == "## Thinking\n\n\n\n## Final Response\n\nIt is disease 0."
    )


def test_published_items_all_come_through(shared, llm_server, doctor, command, scripted):
    rows = json.loads((shared / "data" / "medical_demo_198.json").read_text())
    answers = {row[QUESTION_KEY]: row[ANSWER_KEY] for row in rows}
    plan = {question: (0, 1, 2, 3, 99)[n % 5] for n, question in enumerate(answers)}
    server = llm_server(doctor(answers, plan))
    records = scripted.load(
        command("search", rows, server, **{"llm.concurrency": 32}), "search.json"
    )
    assert len(records) == 198
    for row, record in zip(rows, records, strict=True):
        assert list(record) == [*row, "trajectory"]  # the published keys, in the published order
        assert {key: record[key] for key in row if key not in ("Complex_CoT", "Response")} == {
            key: row[key] for key in row if key not in ("Complex_CoT", "Response")
        }
        verdicts = [step["verdict"] for step in record["trajectory"][:-2]]
        wrong = plan[row[QUESTION_KEY]]
        assert verdicts == [False] * min(wrong, 10) + [True]
        assert record["trajectory"][-3]["strategy"] == (
            "initial"
            if wrong == 0
            else "label_guided"
            if wrong == 99
            else drawn(row[QUESTION_KEY], row[ANSWER_KEY], 1, wrong)
        )
    # 40 items of 5, 40 of 7, 40 of 9 calls, 39 of 11 and 39 of 19 where no two items share a
    # verdict
    verdicts = {
        (step["conclusion"], record[ANSWER_KEY])
        for record in records
        for step in record["trajectory"][:-2]
    } | {(record["Response"], record[ANSWER_KEY]) for record in records}
    others = 40 * 3 + 40 * 4 + 40 * 5 + 39 * 6 + 39 * (3 + 9 + 1)
    assert len(server.bodies) == others + len(verdicts)


def faults_of(record):
    return {
        (step["strategy"], call["prompt"]): call["faults"]
        for step in record["trajectory"]
        for call in step["calls"]
        if call["faults"]
    }


def report_rows(folder, title):
    """The rows of a table of report.md, cell by cell."""
    table = (folder / "report.md").read_text().split(f"## {title}\n")[1].split("##")[0]
    return [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in table.strip().splitlines()[2:]
    ]


def test_a_leaked_label_is_asked_for_again_wherever_it_appears(searched, scripted, tmp_path):
    leaky_chain = scripted.chain("no", after=True).replace("Is that so", "It was marked wrong")
    leaky_text = f"Hmm, it matches the given answer.\n\nSo.\n\n{scripted.PONDERING}"
    faults = {
        "continue": [leaky_chain],
        "monologue": [json.dumps({"NaturalReasoning": leaky_text})],
        "response": ["The correct answer is disease 0."],
    }
    (record,), _, _, server = searched([99], faults=faults, max_attempts=1, max_depth=1)
    assert [len(found) for found in faults_of(record).values()] == [1, 1, 1]
    texts = json.dumps([record["Complex_CoT"], record["Response"]])
    assert not any(phrase in texts for phrase in ("given answer", "correct answer"))
    assert not any("marked wrong" in json.dumps(s.get("chain")) for s in record["trajectory"])
    again = [b["messages"][0]["content"] for b in server.bodies if "could not be used" in str(b)]
    assert [text.split("about the answer: ")[1].split(". Answer")[0] for text in again] == [
        "marked wrong",
        "given answer",
        "correct answer",
    ]
    leak = "it shows that its writer was told about the answer"
    assert sorted(report_rows(tmp_path / "out", "Faults of replies")) == [
        ("monologue", leak, "asked again", "1"),
        ("response", leak, "asked again", "1"),
        (f"strategy-{record['trajectory'][1]['strategy']}", leak, "asked again", "1"),
    ]


def test_a_leak_in_a_label_guided_chain_is_asked_for_again(searched, scripted):
    leaky = scripted.chain("disease 0", after=True).replace("Is that so", "I was told")
    (record,), _, model, _ = searched([99], faults={"continue": [leaky]}, max_depth=0)
    assert list(faults_of(record)) == [("label_guided", "label")]
    assert model.log["What ails patient 0?"].count("label_guided") == 2


def test_a_short_monologue_is_asked_for_once_more_and_then_used(searched, scripted, tmp_path):
    short = [json.dumps({"NaturalReasoning": text}) for text in ("Hmm. So.", "Hm.", "x" * 2000)]
    records, _, model, server = searched([0, 0], faults={"monologue": short[:2]})
    assert [record["Complex_CoT"] for record in records] == ["Hmm. So."] * 2
    assert len(server.bodies) == 2 * (5 + 1)
    assert faults_of(records[0])["monologue", "monologue"] == [
        "it is too short: about 8 characters, not at least 1300 (kept)",
        "it is too short: about 3 characters, not at least 1300",
    ]
    assert report_rows(tmp_path / "out", "Faults of replies") == [
        ("monologue", "it is too short", "kept", "2"),
        ("monologue", "it is too short", "asked again", "2"),
    ]
    for faults in ([short[0]], [short[2]], [short[0], "no JSON"]):
        (record,), _, _, server = searched(
            [0], faults={"monologue": faults}, output=str(len(str(faults)))
        )
        assert len(server.bodies) == 5 + 1
        kept = record["Complex_CoT"] == "Hmm. So."
        assert kept or record["Complex_CoT"].endswith(scripted.PONDERING)
        assert kept == (len(faults) == 2)
    _, _, _, server = searched(
        [0], faults={"monologue": short}, output="any", min_monologue_length=0
    )
    assert len(server.bodies) == 5


@pytest.mark.parametrize(
    "refusal", ["I must decline to answer this question.", "Consult a doctor.", "It is disease 1."]
)
def test_a_response_that_misses_the_reference_is_written_anew(searched, refusal, tmp_path):
    (record,), _, _, server = searched([0], faults={"response": [refusal]})
    assert record["Response"] == "It is disease 0."
    assert len(server.bodies) == 5 + 2
    records, given_up, _, _ = searched([0], faults={"response": [refusal] * 3}, output="never")
    assert records == []
    assert given_up[0]["trajectory"][-1]["verdict"] is False
    assert report_rows(tmp_path / "never", "Outcomes") == [("given up", "1"), ("all", "1")]
    assert report_rows(tmp_path / "never", "Final responses") == [("True", "0"), ("False", "1")]
    assert report_rows(tmp_path / "never", "Failures")[0][:3] == (
        "given up",
        "its final response does not agree with the reference answer",
        "1",
    )
