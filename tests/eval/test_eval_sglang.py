"""`verippo eval` with a real sglang server: a running one, and one that it starts."""

from __future__ import annotations

import json
import shutil

import pytest

from verippo.core.sampling.server import servers
from verippo.core.text.chat import DEFAULT_TEMPLATE
from verippo.launch import cli

pytestmark = pytest.mark.sglang


@pytest.fixture
def data(tmp_path):
    options = {"A": "one", "B": "two"}
    items = [
        {"question": f"Which is number {n}?", "options": options, "answer_idx": "AB"[n % 2]}
        for n in range(6)
    ]
    # a prompt longer than the context
    long = {"question": "Which? " + "very " * 900, "options": options, "answer_idx": "A"}
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"short": items, "long": [long]}))
    return path


def evaluated(folder, data, *arguments):
    options = {
        "data": data,
        "output": folder,
        "max_new_tokens": 8,
        "runs": 2,
        "llm.concurrency": 4,
        "temperature": 1.0,
    }
    cli.main(
        [
            "eval",
            *[part for name, value in options.items() for part in (f"--{name}", str(value))],
            *arguments,
        ]
    )
    return json.loads((folder / "results.json").read_text())


def check(results):
    assert results["sources"]["short"]["outcomes"]["failed"] == 0
    assert [failure["source"] for failure in results["failures"]] == ["long", "long"]
    assert "context length" in results["failures"][0]["error"]
    assert results["all"]["num"] == 7
    assert all(
        1 <= answer["num_tokens"] <= 8
        for item in results["items"][:6]
        for answer in item["answers"]
    )


def test_running_server_answers_every_item_that_fits(sglang_server, data, tmp_path, capsys):
    arguments = ["--model", sglang_server.model_path, "--base_url", f"{sglang_server.url}/v1"]
    results = evaluated(tmp_path / "eval", data, *arguments)
    check(results)
    assert "made 14 calls, 0 more were in the journal" in capsys.readouterr().out
    assert evaluated(tmp_path / "eval", data, *arguments)["items"] == results["items"]
    assert "made 0 calls, 14 more were in the journal" in capsys.readouterr().out


def test_greedy_answers_equal_those_of_the_local_engine(sglang_server, data, tmp_path):
    greedy = ["--model", sglang_server.model_path, "--temperature", "0", "--runs", "1"]
    evaluated(tmp_path / "served", data, *greedy, "--base_url", f"{sglang_server.url}/v1")
    evaluated(tmp_path / "local", data, *greedy, "--engine", "local", "--dtype", "fp32")
    served, local = (
        (tmp_path / name / "answers.jsonl").read_text().splitlines() for name in ("served", "local")
    )
    assert [json.loads(line)["text"] for line in served] == [
        json.loads(line)["text"] for line in local
    ]
    assert any(json.loads(line)["text"] for line in local)


def test_own_server_is_started_applies_its_template_and_stops(
    sglang_options, make_model, data, tmp_path
):
    model = shutil.copytree(make_model("llama"), tmp_path / "model")
    (model / "chat_template.jinja").write_text(DEFAULT_TEMPLATE)
    fields = sglang_options | {
        "environment": json.dumps(sglang_options["environment"]),
        "state": str(tmp_path / "state"),
    }
    arguments = [
        part for name, value in fields.items() for part in (f"--server.{name}", str(value))
    ]
    check(
        evaluated(
            tmp_path / "eval",
            data,
            "--model",
            str(model),
            "--engine",
            "serve",
            "--endpoint",
            "chat",
            *arguments,
        )
    )
    assert servers(str(tmp_path / "state")) == []
