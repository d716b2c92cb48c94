"""`verippo eval` with a scripted server and in-process: results, resume, errors and page."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from verippo.core.sampling.local_sampler import LocalSampler
from verippo.core.sampling.server import servers
from verippo.core.text.chat import render_text
from verippo.core.text.encoding import encode
from verippo.core.training.pretrained import load_tokenizer
from verippo.eval.answering import server_prompt
from verippo.eval.asked_questions import build_messages, list_questions_to_ask
from verippo.eval.config import EvalConfig
from verippo.eval.evaluate import evaluate
from verippo.eval.questions import Question, load_questions
from verippo.launch import cli

GOLD = "ABCDABCDAB"
OPTIONS = {"A": "alpha", "B": "beta", "C": "gamma", "D": "delta"}


def write_items(path: Path, num: int = 10, **others: list) -> Path:
    """{"demo": items 0..num-1}: question "Item <n>?", right letter GOLD[n]."""
    items = [
        {
            "question": f"Item <{n}>?",
            "options": OPTIONS,
            "answer_idx": GOLD[n % 10],
            "answer": OPTIONS[GOLD[n % 10]],
        }
        for n in range(num)
    ]
    path.write_text(json.dumps({"demo": items, **others}))
    return path


def item_of(body: dict) -> int:
    return int(re.search(r"Item <(\d+)>", body.get("prompt") or body["messages"][-1]["content"])[1])


@pytest.fixture(scope="module")
def model(make_model):
    return str(make_model())


@pytest.fixture
def ask(tmp_path, model):
    """Evaluates data with a scripted server or the local engine, and returns results.json."""

    def run(server=None, *, folder="eval", num=10, llm=None, **options):
        data = options.pop("data", None) or str(write_items(tmp_path / f"data-{num}.json", num))
        base = {"base_url": server.url} if server else {}
        llm = {"concurrency": 4, "max_retries": 0, **(llm or {})}
        config = EvalConfig(
            **{
                "data": data,
                "output": str(tmp_path / folder),
                "model": model,
                **base,
                **options,
                "llm": dataclasses.replace(
                    EvalConfig(data="", output="", model="x", base_url="x").llm, **llm
                ),
            }
        )
        evaluate(config, resolved=dataclasses.asdict(config))
        return json.loads((tmp_path / folder / "results.json").read_text())

    return run


@pytest.fixture
def mixed(llm_server):
    """Items 0-3 and 9 right (9 in the thinking format), 4-5 wrong, 6 empty, 7 cut, 8 refused."""
    module = llm_server.module

    def answer(body):
        n = item_of(body)
        if n in (4, 5):
            return f"The answer is {'ABCD'[(n + 1) % 4]}."
        scripts = {
            6: "",
            7: module.Answer("## Thinking\n\nhm hm", finish_reason="length"),
            8: module.error(400, "too long"),
            9: f"## Thinking\n\nIt fits.\n\n## Final Response\n\nThe answer is {GOLD[n % 10]}.",
        }
        return scripts.get(n, f"The answer is {GOLD[n % 10]}.")

    return llm_server(answer)


def test_results_match_hand_worked_values(ask, mixed, capsys):
    results = ask(mixed)
    demo = results["sources"]["demo"]
    assert demo["num"] == 10
    assert demo["accuracy"]["value"] == 0.5
    assert demo["accuracy"]["low"] == pytest.approx(0.2366, abs=1e-4)  # Wilson, 5 of 10
    assert demo["accuracy"]["high"] == pytest.approx(0.7634, abs=1e-4)
    assert demo["outcomes"] == {"right": 5, "wrong": 2, "no answer": 2, "failed": 1}
    assert demo["rules"] == {"statement": 7, "none": 3}
    assert demo["format_rate"] == 0.1
    # 4 words: "The answer is X."; 0 of the empty one; 4 of the cut one; 11 of the long one
    assert demo["length"] == pytest.approx(
        {"mean": 39 / 9, "median": 4, "p95": 8.2, "longest": 11, "truncated_rate": 1 / 9}
    )
    # the original drops the empty answer and the failed one: 5 of 8
    assert demo["scorings"]["original"]["value"] == 5 / 8
    assert demo["scorings"]["original"]["num"] == 8
    assert demo["scorings"]["strict_cascade"]["value"] == 0.5
    assert results["all"]["accuracy"] == demo["accuracy"]
    answers = [(item["index"], item["gold"], item["answers"][0]) for item in results["items"]]
    assert [(index, gold, answer["letter"], answer["outcome"]) for index, gold, answer in answers][
        3:9
    ] == [
        (3, "D", "D", "right"),
        (4, "A", "B", "wrong"),
        (5, "B", "C", "wrong"),
        (6, "C", None, "no answer"),
        (7, "D", None, "no answer"),
        (8, "A", None, "failed"),
    ]
    assert results["items"][7]["answers"][0]["truncated"]
    printed = capsys.readouterr().out
    assert re.search(
        r"^demo +10 +50.0% +\(23.7% to 76.3%\) +62.5% +2 +1 +11.1%", printed, re.MULTILINE
    )


def test_failed_items_are_named_and_retried_only_on_demand(ask, mixed, capsys, tmp_path):
    results = ask(mixed)
    (failure,) = results["failures"]
    assert (failure["source"], failure["index"]) == ("demo", 8)
    assert "HTTP 400: too long" in failure["error"]
    assert "demo item 8: " in capsys.readouterr().err
    assert len(mixed.bodies) == 10
    assert ask(mixed)["failures"] == results["failures"]
    assert len(mixed.bodies) == 10
    mixed.answer = lambda body: "The answer is A."
    again = ask(mixed, retry_failed=True)
    assert len(mixed.bodies) == 11
    assert again["failures"] == []
    assert again["all"]["outcomes"] == {"right": 6, "wrong": 2, "no answer": 2, "failed": 0}
    assert "HTTP 400: too long" not in (tmp_path / "eval" / "report.html").read_text()


def test_original_scoring_leads_when_selected(ask, mixed):
    results = ask(mixed, scoring="original")
    assert results["all"]["accuracy"]["value"] == 5 / 8
    assert results["all"]["scorings"]["strict_cascade"]["value"] == 0.5
    # the first and the last option named differ, and the last is right more often
    mixed.answer = lambda body: (
        f"Not {'D' if item_of(body) % 4 != 3 else 'A'}. It is {GOLD[item_of(body)]}."
    )
    results = ask(mixed, folder="two-readings", scoring="original")
    assert results["all"]["accuracy"]["value"] == 1.0
    assert [item["answers"][0]["letter"] for item in results["items"]] == list(GOLD)


def test_requests_use_published_settings_and_distinct_seeds(ask, mixed):
    ask(mixed)
    assert set(mixed.paths) == {"/v1/completions"}
    bodies = {item_of(body): body for body in mixed.bodies}
    assert all(
        (body["temperature"], body["top_p"], body["max_tokens"]) == (0.5, 0.9, 2000)
        for body in bodies.values()
    )
    assert len({body["seed"] for body in bodies.values()}) == 10
    assert all(0 <= body["seed"] < 2**31 for body in bodies.values())
    assert bodies[3]["prompt"].endswith(
        "Item <3>?\n\nA. alpha\nB. beta\nC. gamma\nD. delta</s>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert 'End with the sentence "The answer is A."' in bodies[3]["prompt"]


def test_chat_endpoint_gets_plain_messages(ask, mixed):
    ask(
        mixed,
        endpoint="chat",
        system_prompt="Be brief.",
        prompt="thinking",
        llm={"model": "known-as"},
    )
    assert set(mixed.paths) == {"/v1/chat/completions"}
    body = mixed.bodies[0]
    assert body["model"] == "known-as"
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "`## Thinking`" in body["messages"][1]["content"]
    assert "`## Final Response`" in body["messages"][1]["content"]


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_empty_answer_is_no_answer_and_not_retried(ask, llm_server, endpoint):
    server = llm_server(
        lambda body: "" if item_of(body) % 2 else f"The answer is {GOLD[item_of(body)]}."
    )
    results = ask(server, endpoint=endpoint, llm={"max_retries": 2})
    assert results["all"]["outcomes"] == {"right": 5, "wrong": 0, "no answer": 5, "failed": 0}
    assert results["failures"] == []
    assert len(server.bodies) == 10
    assert results["all"]["accuracy"]["value"] == 0.5  # empty answers stay in the denominator
    assert results["all"]["scorings"]["original"]["value"] == 1.0


def test_server_prompt_tokenizes_to_the_training_ids(tokenizer_folder):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(str(tokenizer_folder))
    question = Question(
        id="x",
        source="s",
        question="{options} or 1 < 2?",
        options=OPTIONS,
        gold="A",
        index=0,
        file="f",
    )
    config = EvalConfig(data="", output="", model="x", base_url="http://x/v1", prompt="free")
    conversation = build_messages(config, question)
    assert "{options} or 1 < 2?\n\nA. alpha" in conversation[0]["content"]
    text = render_text(tokenizer, conversation, add_generation_prompt=True)
    ids = encode(tokenizer, text)
    assert tokenizer.encode(server_prompt(tokenizer, text)) == ids
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    # the begin token that the tokenizer adds replaces the template's
    assert tokenizer.encode(server_prompt(tokenizer, text)) == ids
    assert ids[:2] != [1, 1]


def test_runs_give_mean_majority_and_pass_at_k(ask, llm_server):
    asked: dict[int, int] = {}

    def answer(body):  # item 0: right, right, wrong; item 1: always another letter
        n = item_of(body)
        asked[n] = asked.get(n, -1) + 1
        return f"The answer is {['AAB', 'CDA'][n][asked[n]]}."

    results = ask(llm_server(answer), num=2, runs=3, llm={"concurrency": 1})
    everything = results["all"]
    assert everything["accuracy"]["value"] == pytest.approx(2 / 6)
    # at k = 2, item 0 gives 1 - C(1,2)/C(3,2) = 1
    assert everything["pass_at_k"] == pytest.approx({"1": 1 / 3, "2": 1 / 2, "3": 1 / 2})
    assert everything["majority"]["value"] == 0.5
    assert [[a["letter"] for a in item["answers"]] for item in results["items"]] == [
        ["A", "A", "B"],
        ["C", "D", "A"],
    ]


def test_permutations_distinguish_letter_bias_from_choice(ask, llm_server):
    stubborn = llm_server(lambda body: "The answer is A.")
    results = ask(stubborn, folder="stubborn", permutations=3)
    position = results["all"]["position"]
    assert len(stubborn.bodies) == 40
    assert position["shares"] == {"A": 1.0, "B": 0.0, "C": 0.0, "D": 0.0}
    assert position["statistic"] == pytest.approx(40**2 / 10 - 40)  # (40-10)^2/10 + 3 * 10^2/10
    assert results["all"]["accuracy"]["value"] == 0.3  # in the file's order: GOLD has three A
    assert 0 < position["agreement"] < 0.6

    def informed(body):
        letters = {
            text: letter
            for letter, text in re.findall(r"^([A-D])\. (\w+)", body["prompt"], re.MULTILINE)
        }
        return f"The answer is {letters[OPTIONS[GOLD[item_of(body)]]]}."

    position = ask(llm_server(informed), folder="informed", permutations=3)["all"]["position"]
    assert position["agreement"] == 1.0
    assert [cell["value"] for cell in position["accuracies"]] == [1.0] * 4


def test_draws_depend_only_on_seed_item_run_and_order(tmp_path):
    questions, _ = load_questions(str(write_items(tmp_path / "data.json", 6)))
    cases = list_questions_to_ask(questions, runs=2, permutations=1, seed=0)
    assert len({case.seed for case in cases}) == 24
    alone = list_questions_to_ask(questions[3:4], runs=3, permutations=2, seed=0)
    assert alone[1] == cases[13]
    others = list_questions_to_ask(questions, runs=2, permutations=1, seed=1)
    assert not {case.seed for case in others} & {case.seed for case in cases}
    shown = [case.question.options for case in cases]
    assert shown[2] != shown[0] or shown[6] != shown[4]
    assert all(
        {case.question.options[shown]: own for shown, own in case.file_letters.items()}
        == {t: k for k, t in OPTIONS.items()}
        for case in cases
    )


def test_killed_evaluation_resumes_without_asking_twice(ask, llm_server, tmp_path, model):
    server = llm_server(
        lambda body: f"The answer is {'ABCD'[item_of(body) % 4]}.", delay_seconds=0.05
    )
    data = str(write_items(tmp_path / "data.json", 80))
    command = [
        sys.executable,
        "-m",
        "verippo.launch.cli",
        "eval",
        "--data",
        data,
        "--output",
        str(tmp_path / "eval"),
        "--model",
        model,
        "--base_url",
        server.url,
        "--llm.concurrency",
        "4",
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(server.bodies) < 30 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 30 <= len(server.bodies) < 80
    assert not (tmp_path / "eval" / "results.json").exists()
    results = ask(server, data=data)
    assert len(server.bodies) <= 80 + 4  # calls in flight when it was killed
    assert len(server.calls) == 80
    assert results["items"] == ask(server, data=data, folder="unbroken")["items"]


def test_three_thousand_items_are_asked_concurrently_once(ask, llm_server, tmp_path):
    shared = Path(__file__).resolve().parents[3] / "shared" / "data"
    files = [*shared.glob("Med*.json"), *shared.glob("PubMed*.json"), *shared.glob("MMLU*.json")]
    if not files:
        files = [write_items(tmp_path / "data.json", 3000)]
    # about half of the answers are empty
    server = llm_server(
        lambda body: "The answer is B." if body["seed"] % 2 else "", delay_seconds=0.01
    )
    results = ask(server, data=",".join(map(str, files)), llm={"concurrency": 64})
    everything = results["all"]
    assert everything["num"] >= 3000
    assert len(server.bodies) == everything["num"] == sum(everything["outcomes"].values())
    assert server.most_open > 32
    right = sum(
        item["gold"] == "B" and item["answers"][0]["letter"] == "B" for item in results["items"]
    )
    assert everything["outcomes"]["right"] == right
    assert everything["accuracy"]["value"] == pytest.approx(right / everything["num"])
    assert (tmp_path / "eval" / "report.html").stat().st_size < 4_000_000


def test_malformed_items_are_refused_or_skipped(ask, mixed, tmp_path, capsys):
    good = json.loads(write_items(tmp_path / "good.json", 3).read_text())["demo"]
    path = tmp_path / "bad.json"
    path.write_text(
        json.dumps({"demo": [good[0], {**good[1], "answer_idx": "Z"}, {**good[2], "options": {}}]})
    )
    with pytest.raises(ValueError, match=r"bad.json: 2 malformed of 3 items"):
        ask(mixed, data=str(path))
    named = capsys.readouterr().err
    assert re.search(
        r"malformed: .*bad.json: demo item 1: .*Z.*\nmalformed: .*bad.json: demo item 2: ", named
    )
    results = ask(mixed, data=str(path), skip_bad=True)
    assert results["all"]["num"] == 1
    lines = capsys.readouterr().err
    assert re.search(
        r"skipped: .*bad.json: demo item 1: .*\n(.*\n)*.*skipped: .*bad.json: demo item 2: ", lines
    )
    assert [re.search(r"bad.json: demo item (\d)", line)[1] for line in results["malformed"]] == [
        "1",
        "2",
    ]


def test_local_engine_is_reproducible_and_resumes(ask, monkeypatch, tmp_path):
    options = {
        "engine": "local",
        "dtype": "fp32",
        "num": 3,
        "runs": 2,
        "max_new_tokens": 12,
        "temperature": 1.0,
        "max_batch": 2,
    }
    first, other = ask(folder="first", **options), ask(folder="other", **options)
    assert first["items"] == other["items"]
    texts = [
        json.loads(line)["text"]
        for line in (tmp_path / "first" / "answers.jsonl").read_text().splitlines()
    ]
    assert len(set(texts)) == 6
    assert first["config"]["top_p"] == 1.0
    assert {a["num_tokens"] for item in first["items"] for a in item["answers"]} <= set(
        range(1, 13)
    )
    monkeypatch.setattr(
        LocalSampler, "generate", lambda self, prompts, params: [1 / 0 for _ in prompts]
    )
    assert ask(folder="first", **options)["items"] == first["items"]


def test_local_answers_arrive_while_others_are_decoded(ask, monkeypatch, tmp_path):
    generate = LocalSampler.generate
    arrived = []

    def watched(self, prompts, params):
        on_completion = self.on_completion

        def count(number, completion):
            on_completion(number, completion)
            journal = (tmp_path / "eval" / "journal.jsonl").read_text()
            arrived.append(journal.count("finish_reason"))

        if on_completion:  # not the sampler of the self-check
            self.on_completion = count
        return generate(self, prompts, params)

    monkeypatch.setattr(LocalSampler, "generate", watched)
    ask(engine="local", dtype="fp32", num=5, max_new_tokens=4, max_batch=2)
    assert arrived == [1, 2, 3, 4, 5]


def test_local_engine_fails_only_the_prompt_that_is_too_long(ask, tmp_path):
    long = {"question": "Item? " + "very " * 800, "options": OPTIONS, "answer_idx": "A"}
    data = write_items(tmp_path / "data.json", 2, long=[long])
    results = ask(data=str(data), engine="local", dtype="fp32", max_new_tokens=8)
    assert [failure["source"] for failure in results["failures"]] == ["long"]
    assert "tokens of prompt leave no room for max_new_tokens=8" in results["failures"][0]["error"]
    assert results["sources"]["long"]["length"] is None
    assert results["all"]["num"] == 3


def test_resume_refuses_changed_weights(ask, mixed, model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    ask(mixed, model=str(copy))
    os.utime(copy / "model.safetensors", (1, 1))
    with pytest.raises(
        ValueError, match="its weights have changed since the answers in the journal"
    ):
        ask(mixed, model=str(copy))


def test_resume_never_refuses_a_folder_with_a_journal(ask, mixed):
    ask(mixed, resume="never")
    with pytest.raises(ValueError, match="holds an evaluation already"):
        ask(mixed, resume="never")


def test_server_without_answers_ends_the_run(ask, llm_server):
    server = llm_server(lambda body: llm_server.module.error(400, "broken"))
    with pytest.raises(ValueError, match="none of the first 4 calls got an answer.*broken"):
        ask(server)
    server = llm_server(lambda body: "ok")
    server.close()
    with pytest.raises(ValueError, match="none of the first 4 calls got an answer.*connection"):
        ask(server, folder="gone")


def test_own_server_is_stopped_when_the_run_fails(fake_sglang, tmp_path, capsys):
    state, data = tmp_path / "state", write_items(tmp_path / "data.json")  # the server refuses all
    fields = {name: str(value) for name, value in fake_sglang.items() if name != "model"} | {
        "state": str(state),
        "port": "0",
    }
    options = {
        "data": data,
        "output": tmp_path / "eval",
        "model": fake_sglang["model"],
        "engine": "serve",
        "endpoint": "chat",
    }
    options |= {f"server.{name}": value for name, value in fields.items()}
    with pytest.raises(SystemExit) as caught:
        cli.main(
            [
                "eval",
                *[part for name, value in options.items() for part in (f"--{name}", str(value))],
            ]
        )
    assert caught.value.code == 2
    assert "none of the first 10 calls got an answer" in capsys.readouterr().err
    assert list(state.glob("*.log"))
    assert servers(str(state)) == []


def test_spent_budget_ends_the_run_and_keeps_answers(ask, llm_server):
    server = llm_server(lambda body: "The answer is A.")
    # an answer of full length costs 1 USD, these cost 0.002 each
    price = {"price_out": 1e6 / 2000, "concurrency": 1}
    with pytest.raises(ValueError, match="stopped after 3 answers: .*budget_usd=1.005"):
        ask(server, llm=price | {"budget_usd": 1.005})
    assert len(server.bodies) == 3
    assert ask(server, llm=price)["all"]["num"] == 10
    assert len(server.bodies) == 10


def test_page_escapes_all_text_and_runs_only_its_script(ask, llm_server, tmp_path):
    hostile = "<script>alert(1)</script><img src=//evil.example/a.png>{{ 7*7 }}"
    items = [
        {"question": hostile, "options": {"A": hostile, "B": "x"}, "answer_idx": "B", "id": '"><b>'}
    ] * 1
    path = tmp_path / "data.json"
    path.write_text(json.dumps({hostile: items}))
    ask(llm_server(lambda body: hostile + "</details> The answer is A."), data=str(path))
    page = (tmp_path / "eval" / "report.html").read_text()
    assert "<img" not in page
    assert "{{ 7*7 }}" in page
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1].replace("&#39;", "'")
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert page.count('<details class="card item"') == 1
    assert "wrong: A, not B" in page


def test_page_shows_both_scorings_and_every_source(ask, mixed, tmp_path):
    extra = [{"question": "Item <0>?", "options": OPTIONS, "answer_idx": "A"}]
    data = write_items(tmp_path / "two.json", 10, other=extra)
    ask(mixed, data=str(data))
    page = (tmp_path / "eval" / "report.html").read_text()
    for text in (
        "Strict cascade",
        "Original rule",
        "demo",
        "other",
        "all",
        "1 answer failed for good",
        "demo item 8",
    ):
        assert text in page
    outcomes = re.findall(
        r'data-source="demo" data-outcome="([^"]*)" data-rule="([^"]*)" data-end="([^"]*)"', page
    )
    assert outcomes == [
        ("wrong", "statement", "stopped"),
        ("wrong", "statement", "stopped"),
        ("no answer", "none", "stopped"),
        ("no answer", "none", "truncated"),
        ("failed", "none", "stopped"),
    ]


def test_journal_of_another_process_is_refused(ask, mixed, tmp_path):
    from verippo.core.llm.journal import Journal

    with Journal(tmp_path / "eval" / "journal.jsonl") as journal:
        asyncio.run(journal.record("x", 1))
        with pytest.raises(ValueError, match="another process"):
            ask(mixed)
    assert not (tmp_path / "eval" / "config.yaml").exists()  # the other run's file is kept


def test_other_settings_ask_for_another_folder(ask, mixed, tmp_path):
    ask(mixed)
    results, settings = (tmp_path / "eval" / name for name in ("results.json", "config.yaml"))
    before = results.read_bytes(), settings.read_bytes()
    for changed, named in (
        ({"temperature": 0.9}, "temperature 0.5 -> 0.9"),
        ({"prompt": "free", "seed": 3}, "prompt strict -> free, seed 0 -> 3"),
        ({"scoring": "original"}, "scoring strict_cascade -> original"),
        ({"limit": 2}, "limit None -> 2"),
        ({"num": 4}, r"data \S*data-10.json -> \S*data-4.json"),
        ({"llm": {"model": "b"}}, "llm.model  -> b"),
    ):
        with pytest.raises(ValueError, match=rf"eval: holds an .*{named}.*another --output"):
            ask(mixed, **changed)
    assert (results.read_bytes(), settings.read_bytes()) == before
    assert len(mixed.bodies) == 10


def test_items_runs_and_orders_can_be_added(ask, llm_server, tmp_path):
    server = llm_server(lambda body: f"The answer is {GOLD[item_of(body)]}.")
    ask(server, limit=3)
    ask(server)
    assert len(server.bodies) == 10
    ask(server, runs=2)
    assert len(server.bodies) == 20
    more = {"runs": 2, "permutations": 1}
    ask(server, **more, llm={"concurrency": 2})
    assert len(server.bodies) == 40
    data = ",".join(str(tmp_path / f"data-{num}.json") for num in (10, 2))
    other = {"question": "Item <5>?", "options": OPTIONS, "answer_idx": "A"}
    (tmp_path / "data-2.json").write_text(json.dumps({"other": [other]}))
    assert ask(server, data=data, **more)["all"]["num"] == 11
    with pytest.raises(ValueError, match="runs 2 -> 1"):
        ask(server, data=data, permutations=1)


def test_settings_can_change_after_a_run_without_answers(ask, llm_server):
    module = llm_server.module
    server = llm_server(
        lambda body: "ok" if "messages" in body else module.error(404, "no completions")
    )
    with pytest.raises(ValueError, match="no completions"):
        ask(server)
    assert ask(server, endpoint="chat")["all"]["num"] == 10
