"""Faulty answers, failures, budgets and kills: nothing is lost, nothing finished is paid twice."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pyarrow.parquet
import pytest

from verippo.core.text.data import ANSWER_KEY, QUESTION_KEY
from verippo.launch import cli

CHAIN = {
    "CoT": [
        {"action": "Inner Thinking", "title": "t", "content": "c"},
        {"action": "Final Conclusion", "content": "f"},
        {"action": "Verification", "content": "v"},
    ]
}
THINK, CONCLUDE, VERIFY = CHAIN["CoT"]
FAULTS = {
    "prose": ("chain", "The patient has a cold.", "holds no JSON object"),
    "refusal": ("chain", "I'm sorry, but I can't help with that.", "holds no JSON object"),
    "cut off": ("chain", json.dumps(CHAIN)[:-30], "breaks off"),
    "invalid": ("chain", '{"CoT": [,]}', "is not valid"),
    "two objects": ("chain", json.dumps(CHAIN) * 2, "more than one JSON object"),
    "wrong key": (
        "chain",
        json.dumps({"steps": CHAIN["CoT"]}),
        'has the keys "steps", not exactly "CoT"',
    ),
    "no list": ("chain", '{"CoT": "thinking"}', '"CoT" is not a list of objects'),
    "order": (
        "chain",
        json.dumps({"CoT": [THINK, VERIFY, CONCLUDE]}),
        "last three actions are not",
    ),
    "two steps": ("chain", json.dumps({"CoT": [CONCLUDE, VERIFY]}), "last three actions are not"),
    "action": (
        "chain",
        json.dumps({"CoT": [{"action": "Guess", "content": "c"}]}),
        'step 1 has the action "Guess"',
    ),
    "no content": (
        "chain",
        json.dumps({"CoT": [{"action": "Inner Thinking"}]}),
        "step 1 (Inner Thinking) has the keys",
    ),
    "blank": (
        "chain",
        json.dumps({"CoT": [THINK, CONCLUDE | {"content": " "}, VERIFY]}),
        '"content" is empty',
    ),
    "not text": (
        "chain",
        json.dumps({"CoT": [THINK, CONCLUDE | {"content": 5}, VERIFY]}),
        '"content" is not text',
    ),
    "heading": (
        "monologue",
        '{"NaturalReasoning": "## Thinking"}',
        'holds the heading "## Thinking"',
    ),
    "monologue": ("monologue", '{"Reasoning": "Hm."}', 'not exactly "NaturalReasoning"'),
    "unpaired surrogate": ("monologue", '{"NaturalReasoning": "\\ud800"}', "unpaired surrogate"),
    "response": (
        "response",
        "As an AI I am unable to provide medical advice.",
        "it has a preface or a closing offer: As an AI",
    ),
    "response heading": ("response", "## Final Response\n\nA cold.", "holds the heading"),
    "untrue": ("verdict", "untrue", "unparsed"),
    "both": ("verdict", "True or False", "unparsed"),
    "not a verdict": ("verdict", "It is true", "unparsed"),
}


@pytest.fixture
def model(doctor, scripted):
    """Problems 0, 1, 2 with one wrong conclusion each."""
    rows = [scripted.problem(n) for n in range(3)]
    answers = {row[QUESTION_KEY]: row[ANSWER_KEY] for row in rows}
    return doctor(answers, dict.fromkeys(answers, 1))


def without_account(records):
    """The records but for what the calls took."""
    return [
        record | {"trajectory": [{**step, "calls": None} for step in record["trajectory"]]}
        for record in records
    ]


def test_a_faulty_answer_is_asked_for_again_with_the_fault_named(
    doctor, llm_server, command, scripted, tmp_path
):
    """Each of FAULTS at once, in a problem of its own, with one wrong conclusion."""
    rows = [scripted.problem(n) for n in range(len(FAULTS))]
    answers = {row[QUESTION_KEY]: row[ANSWER_KEY] for row in rows}
    model = doctor(answers, dict.fromkeys(answers, 1))
    good = without_account(
        scripted.load(command("search", rows, llm_server(model), output="good"), "search.json")
    )
    cases = dict(zip(answers, FAULTS.values(), strict=True))
    answered = set()

    def script(body):
        prompt = body["messages"][0]["content"]
        question = next(
            q
            for q, answer in answers.items()
            if q in prompt or f"<reference>\n{answer}\n" in prompt
        )
        kind, text, _ = cases[question]
        if kind != scripted.kind_of(prompt, scripted.OPENINGS) or question in answered:
            return model(body)
        answered.add(question)
        return text

    server = llm_server(script)
    records = scripted.load(command("search", rows, server), "search.json")
    assert without_account(records) == good
    assert len(server.bodies) == len(rows) * (7 + 1)
    for record, (kind, _, fault) in zip(records, FAULTS.values(), strict=True):
        ((found,),) = [
            call["faults"]
            for step in record["trajectory"]
            for call in step["calls"]
            if call["faults"]
        ]
        assert fault in found
        again = [
            body["messages"][0]["content"]
            for body in server.bodies
            if f"could not be used: {found}." in str(body)
        ]
        assert any(kind == scripted.kind_of(text, scripted.OPENINGS) for text in again)
    assert "| unparsed | 3 |" in (tmp_path / "out" / "report.md").read_text()


def test_a_fence_and_prose_around_the_object_are_passed_over(doctor, llm_server, command, scripted):
    around = [
        "```json\n{}\n```",
        "Here it is:\n{}\nI hope it helps.",
        "```\n{}```",
        "\ufeff {}",
        "<think>{{Hm}}. So.</think>\n{}",
        "{{Hm}}. So.</think>\n{}",
    ]
    rows = [scripted.problem(n) for n in range(len(around))]
    answers = {row[QUESTION_KEY]: row[ANSWER_KEY] for row in rows}
    model = doctor(answers, dict.fromkeys(answers, 1))

    def script(body):
        text = model(body)
        number = re.search(r"patient (\d)", body["messages"][0]["content"])
        return around[int(number[1])].format(text) if text.startswith("{") else text

    server = llm_server(script)
    assert len(scripted.load(command("search", rows, server), "search.json")) == len(around)
    assert len(server.bodies) == 7 * len(around)


def test_an_answer_cut_at_its_limit_is_a_fault_even_when_it_reads_well(
    model, llm_server, command, scripted
):
    answer = llm_server.module.Answer
    cut = {"response": "It is", "chain": '{"C'}
    model.faults = {kind: [answer(text=text, finish_reason="length")] for kind, text in cut.items()}
    (record,) = scripted.load(
        command("search", [scripted.problem(0)], llm_server(model)), "search.json"
    )
    assert record["Response"] == "It is disease 0."
    faults = {
        call["prompt"]: call["faults"]
        for step in record["trajectory"]
        for call in step["calls"]
        if call["faults"]
    }
    assert faults["response"] == ["it is cut off, as it is too long"]
    assert faults["chain"][0].startswith("it is cut off, as it is too long (its JSON breaks off")


def test_transport_faults_of_every_kind_lose_nothing(
    model, llm_server, command, scripted, monkeypatch
):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    Answer, error = llm_server.module.Answer, llm_server.module.error
    rows = [scripted.problem(n) for n in range(3)]
    good = scripted.load(command("search", rows, llm_server(model), output="good"), "search.json")
    model.asked.clear()
    faults = [
        error(429, retry_after="0"),
        error(500),
        Answer(reset=True),
        Answer(missing_bytes=9),
        Answer(text=""),
    ]
    model.faults = {
        "chain": faults,
        "continue": [error(503), Answer(body=b"\xff\xfe{")],
        "monologue": [Answer(hang=True)],
        "response": [Answer(body=b'{"choices": [{"mess')],
    }
    server = llm_server(model)
    folder = command("search", rows, server, **{"llm.timeout_seconds": 0.5})
    assert scripted.load(folder, "search.json") == good
    assert len(server.bodies) == 3 * (7 + 5 + 2 + 1 + 1)


def test_an_item_that_stays_faulty_is_reported_and_asked_again_only_when_told_to(
    model, llm_server, command, scripted, capsys
):
    rows = [scripted.problem(n) for n in range(3)]
    good = without_account(
        scripted.load(command("search", rows, llm_server(model), output="good"), "search.json")
    )
    model.asked.clear()
    scripts = {"What ails patient 1?": ["nonsense"] * 4}

    class Faulty(type(model)):
        def chain(self, prompt, question):
            bad = scripts.get(question)
            return bad.pop() if bad else super().chain(prompt, question)

    server = llm_server(Faulty(model.answers, model.plan))
    capsys.readouterr()
    folder = command("search", rows, server)
    out = capsys.readouterr().out
    assert without_account(scripted.load(folder, "search.json")) == [good[0], good[2]]
    line = "1 of 3 items failed; --retry_failed asks again. The first: chain: it holds no JSON object (3 asks)"
    assert line in out.splitlines()
    assert (
        "| failed | chain: it holds no JSON object (3 asks) | 1 | What ails patient 1? |"
        in (folder / "report.md").read_text()
    )
    assert "it holds no JSON object (3 asks)" in (folder / "journal.jsonl").read_text()
    assert len(server.bodies) == 7 + 3 + 7

    command("search", rows, server)
    assert len(server.bodies) == 17  # the failure is known
    command("search", rows, server, retry_failed="true")
    assert len(server.bodies) == 17 + 1 + 7  # the fourth ask fails too, the fifth is good
    records = scripted.load(folder, "search.json")
    assert without_account(records) == good
    assert len(records[1]["trajectory"][0]["calls"][0]["faults"]) == 4


def test_a_call_refused_for_good_fails_its_item_alone(model, llm_server, command, scripted):
    model.faults = {"response": [llm_server.module.error(400, "no")] * 2}
    rows = [scripted.problem(n) for n in range(2)]
    server = llm_server(model)
    folder = command("search", rows, server)
    assert scripted.load(folder, "search.json") == []
    assert "HTTP 400: no" in (folder / "report.md").read_text()
    command("search", rows, server)
    assert len(server.bodies) == 12
    cli.main(
        [
            "search",
            "--data",
            str(folder.parent / "rows.json"),
            "--output",
            str(folder),
            "--llm.base_url",
            server.url,
            "--llm.model",
            "scripted",
            "--retry_failed",
        ]
    )
    assert len(server.bodies) == 14
    cli.main(
        [
            "search",
            "--retry_failed",
            "--data",
            str(folder.parent / "rows.json"),
            "--output",
            str(folder),
            "--llm.base_url",
            server.url,
            "--llm.model",
            "scripted",
        ]
    )
    assert len(server.bodies) == 18
    assert len(scripted.load(folder, "search.json")) == 2


def test_a_spent_budget_writes_what_is_done_and_ends_with_status_1(
    model, llm_server, command, scripted, tmp_path
):
    server = llm_server(model)
    rows = [scripted.problem(n) for n in range(3)]
    options = {"llm.price_out": 1000, "llm.max_new_tokens": 100, "llm.concurrency": 1}
    with pytest.raises(
        SystemExit, match="items were not finished: .*budget_usd=0.25: raise it"
    ) as caught:
        command("search", rows, server, **options, **{"llm.budget_usd": 0.25})
    assert isinstance(caught.value.code, str)  # the interpreter prints it and ends with status 1
    done = scripted.load(tmp_path / "out", "search.json")
    assert 0 < len(done) < 3
    assert "| unreached |" in (tmp_path / "out" / "report.md").read_text()
    before = len(server.bodies)
    command("search", rows, server, **options, **{"llm.budget_usd": 100})
    assert len(scripted.load(tmp_path / "out", "search.json")) == 3
    assert len(server.bodies) == 21 > before


def test_a_server_that_never_answers_is_named_in_one_line(
    llm_server, command, scripted, capsys, monkeypatch
):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    server = llm_server(lambda body: "")
    server.close()
    for num, failed in (40, 16), (3, 3):
        with pytest.raises(SystemExit) as caught:
            command(
                "search",
                [scripted.problem(n) for n in range(num)],
                server,
                **{"llm.max_retries": 1},
            )
        assert caught.value.code == 2
        assert f"none of the first {failed} calls got an answer" in capsys.readouterr().err


def test_a_server_that_answers_nothing_that_can_be_read_is_not_paid_for_every_item(
    llm_server, command, scripted, capsys
):
    server = llm_server(lambda body: llm_server.module.Answer(body=b'{"error": "overloaded"}'))
    with pytest.raises(SystemExit):
        command(
            "search",
            [scripted.problem(n) for n in range(40)],
            server,
            **{"llm.max_retries": 0, "llm.concurrency": 4},
        )
    assert re.search(
        r"none of the first [4-9] calls got an answer", capsys.readouterr().err
    )  # some fail at one time
    assert len(server.bodies) < 20


def test_an_output_that_is_closed_or_cannot_show_a_letter_ends_no_run_in_a_traceback(
    model, llm_server, command, scripted
):
    folder = command(
        "search",
        [scripted.problem(0) | {QUESTION_KEY: "What ails patient 0? é"}],
        llm_server(lambda _: "no"),
    )
    for closed in (True, False):
        read, write = os.pipe()
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "verippo.launch.cli",
                "search",
                "--config",
                str(folder / "config.yaml"),
            ],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )
        os.close(write)
        if closed:
            os.close(read)
        _, complaint = process.communicate(timeout=60)
        assert process.returncode == (1 if closed else 0)
        assert (
            complaint.splitlines()[-1].startswith("verippo: standard output was closed") == closed
        )


def test_values_that_json_has_no_type_for_are_written_as_text(
    model, llm_server, command, scripted, tmp_path
):
    table = pyarrow.Table.from_pylist([scripted.problem(0) | {"when": datetime.date(2020, 1, 2)}])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    folder = command("search", [], llm_server(model), data=tmp_path / "rows.parquet")
    assert [record["when"] for record in scripted.load(folder, "search.json")] == ["2020-01-02"]


def test_failures_of_an_earlier_run_are_no_sign_of_a_server_that_never_answers(
    model, llm_server, command, scripted, capsys
):
    rows = [scripted.problem(n) for n in range(3)] + [
        scripted.problem(9, answer=f"no {n}") for n in range(20)
    ]
    rows = [
        row | {QUESTION_KEY: f"{row[QUESTION_KEY]} {n}"} if n > 2 else row
        for n, row in enumerate(rows)
    ]
    refused = llm_server.module.error(400, "too long")
    server = llm_server(lambda body: refused if "patient 9" in str(body) else model(body))
    folder = command("search", rows, server, **{"llm.concurrency": 1})
    assert len(scripted.load(folder, "search.json")) == 3
    calls = len(server.bodies)
    command("search", rows, server, **{"llm.concurrency": 1})
    assert (len(server.bodies), len(scripted.load(folder, "search.json"))) == (calls, 3)
    assert "made 0 calls, 20 more were in the journal" in capsys.readouterr().out


def test_half_a_character_is_refused_in_a_question_and_kept_elsewhere(
    model, llm_server, command, scripted, tmp_path, capsys
):
    rows, server = [scripted.problem(0) | {"note": "half \ud800"}], llm_server(model)
    (tmp_path / "half.json").write_text(
        json.dumps([*rows, scripted.problem(1) | {QUESTION_KEY: "half \ud800?"}])
    )
    with pytest.raises(SystemExit):
        command("search", [], server, data=tmp_path / "half.json")
    assert re.search(r"half.json: row 1: .* unpaired surrogate", capsys.readouterr().err)
    (tmp_path / "half.json").write_text(json.dumps(rows))
    (record,) = scripted.load(
        command("search", [], server, data=tmp_path / "half.json"), "search.json"
    )
    assert record["note"] == "half \ud800"


def test_a_mistake_leaves_no_folder(command, scripted, llm_server, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = llm_server(lambda body: "")
    for options, complaint in [
        ({"llm.base_url": "null"}, "no API key: set OPENAI_API_KEY"),
        ({"limit": -1}, "limit=-1: must be"),
        ({"llm.base_url": "localhost:1"}, "give http://HOST:PORT/v1"),
    ]:
        with pytest.raises(SystemExit) as caught:
            command("search", [scripted.problem(0)], server, **options)
        assert caught.value.code == 2
        assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_resume_never_refuses_and_a_folder_lends_its_journal(
    model, llm_server, command, scripted, capsys, tmp_path
):
    rows, server = [scripted.problem(0)], llm_server(model)
    command("search", rows, server)
    with pytest.raises(SystemExit):
        command("search", rows, server, resume="never")
    assert "holds a journal already" in capsys.readouterr().err
    other = command("search", rows, server, output="other", resume=tmp_path / "out")
    assert len(server.bodies) == 7
    assert (other / "search.json").read_text() == (tmp_path / "out" / "search.json").read_text()
    with pytest.raises(SystemExit):
        command("search", rows, server, resume=tmp_path / "none")
    assert "no journal.jsonl there" in capsys.readouterr().err


def test_other_settings_share_the_calls_that_stay_the_same(model, llm_server, command, scripted):
    rows, server = [scripted.problem(0)], llm_server(model)
    model.plan["What ails patient 0?"] = 99
    command("search", rows, server, max_attempts=1, label_guided="false")
    assert len(server.bodies) == 1 + 1 + 3 * 2
    command("search", rows, server, max_attempts=2, label_guided="false")
    assert len(server.bodies) == 8 + 3  # the second attempt; its conclusions have been judged


@pytest.fixture(scope="module")
def forked():
    """Starts `verippo` with arguments in a process that has everything imported; it can be killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["verippo.search.reasoning", "verippo.launch.cli", "jsonargparse", "pytest"]
    )

    def start(*arguments):
        process = context.Process(target=cli.main, args=(list(arguments),))
        process.start()
        return process

    return start


def killed_often(
    rows, answers, plan, *, llm_server, scripted, forked, tmp_path, doctor, command, num_kills
):
    """Searches in one go and with kills; checks that both end alike and what was asked twice."""
    script = scripted.unique_tokens(doctor(answers, plan), llm_server.module)
    whole = command("search", rows, llm_server(script), output="whole", **{"llm.concurrency": 32})
    server = llm_server(script, delay_seconds=0.005)
    arguments = [
        "search",
        "--data",
        str(tmp_path / "rows.json"),
        "--output",
        str(tmp_path / "out"),
        "--llm.base_url",
        server.url,
        "--llm.model",
        "scripted",
        "--llm.concurrency",
        "32",
    ]
    total, rng = journaled(whole).total(), random.Random(7)
    for target in sorted(rng.sample(range(total // 20, total - total // 20), num_kills)):
        process = forked(*arguments)
        deadline = time.monotonic() + 60
        while len(server.bodies) < target and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.join(timeout=20)
        assert process.exitcode == -signal.SIGKILL
    process = forked(*arguments)
    process.join(timeout=120)
    assert process.exitcode == 0
    for name in (
        "search.json",
        "search_simple_cot.json",
        "search_no_cot.json",
        "given_up.json",
        "report.md",
    ):
        assert (tmp_path / "out" / name).read_text() == (whole / name).read_text()
    # each answer stands once in the journal, which only grows: no finished call was made again
    assert journaled(tmp_path / "out") == journaled(whole)
    assert total <= len(server.bodies) <= total + num_kills * 32


def journaled(folder):
    """How often the journal holds the answer to each request, told by its count of tokens."""
    entries = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    values = [entry["value"] for entry in entries]
    return Counter(value["completion_tokens"] for value in values if "completion_tokens" in value)


def test_kills_change_nothing_and_repeat_no_finished_call(
    llm_server, scripted, forked, tmp_path, doctor, command
):
    rows = [scripted.problem(n) for n in range(20)]
    answers = {row[QUESTION_KEY]: row[ANSWER_KEY] for row in rows}
    plan = {question: (0, 1, 2, 3, 99)[n % 5] for n, question in enumerate(answers)}
    killed_often(
        rows,
        answers,
        plan,
        llm_server=llm_server,
        scripted=scripted,
        forked=forked,
        tmp_path=tmp_path,
        doctor=doctor,
        command=command,
        num_kills=3,
    )


def test_ten_kills_over_published_items(
    shared, llm_server, scripted, forked, tmp_path, doctor, command
):
    rows = json.loads((shared / "data" / "medical_demo_198.json").read_text())
    answers = {row[QUESTION_KEY]: row[ANSWER_KEY] for row in rows}
    plan = {question: (0, 1, 0, 2, 0)[n % 5] for n, question in enumerate(answers)}
    killed_often(
        rows,
        answers,
        plan,
        llm_server=llm_server,
        scripted=scripted,
        forked=forked,
        tmp_path=tmp_path,
        doctor=doctor,
        command=command,
        num_kills=10,
    )
