"""Mistyped paths ask no hub, --offline connects to nothing but given servers, keys are masked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from verippo.core.text.data import ANSWER_KEY, QUESTION_KEY
from verippo.launch import cli

GUARDED = """
import json, os, socket, sys

tried = []
def guarded(original):
    def connect(self, address, *rest):
        local = isinstance(address, (str, bytes)) or address[0] in ("127.0.0.1", "::1")
        if not local:
            tried.append(str(address))
            raise OSError("blocked")
        return original(self, address, *rest)
    return connect
socket.socket.connect = guarded(socket.socket.connect)
socket.socket.connect_ex = guarded(socket.socket.connect_ex)
known = socket.getaddrinfo
def resolve(host, *rest, **options):
    if host not in ("127.0.0.1", "localhost", "::1", None, "", socket.gethostname()):
        tried.append(str(host))
        raise socket.gaierror(-2, "blocked")
    return known(host, *rest, **options)
socket.getaddrinfo = resolve
from verippo.launch import cli
status = 0
try:
    cli.main(json.loads(sys.argv[1]))
except SystemExit as error:
    status = error.code or 0
names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "WANDB_MODE")
print()
print(json.dumps([status, tried, [os.environ.get(name) for name in names]]))
"""
OPTIONS = {
    "problems": "--llm.model m --llm.base_url URL",
    "search": "--llm.model m --llm.base_url URL",
    "sft": "--model MODEL --dtype fp32 --zero_stage 2 --epochs 1 --max_seq_len 256",
    "verifier": "--model MODEL --dtype fp32 --zero_stage 2 --epochs 1 --max_seq_len 256",
    "ppo": "--policy MODEL --verifier.kind exact --dtype fp32 --zero_stage 2 --steps 1"
    " --prompts_per_step 2 --max_prompt_tokens 64 --sampling.max_new_tokens 4",
    "eval": "--engine local --model MODEL --dtype fp32 --max_new_tokens 4",
}
MODEL_COMMANDS = ("sft", "verifier", "ppo", "eval")
ROW = {
    "question": "Which vitamin is lacking in a sailor whose gums bleed after months at sea, and "
    "who ate no fruit?",
    "options": {"A": "Vitamin A", "C": "Vitamin C"},
    "answer_idx": "C",
    QUESTION_KEY: "Which vitamin?",
    ANSWER_KEY: "Vitamin C",
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
}


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("llama", seed=41)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([ROW] * 4))
    return path


def guarded(argv, **environment):
    """Exit status, addresses outside this machine that were tried, and what the run set."""
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "TRANSFORMERS_", "WANDB_")) and name != "OPENAI_BASE_URL"
    }
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, json.dumps([str(part) for part in argv])],
        capture_output=True,
        text=True,
        timeout=150,
        env=plain | environment,
    )
    assert done.stdout, done.stderr
    return *json.loads(done.stdout.splitlines()[-1]), done.stderr


def arguments(name, data, output, model, url, *more):
    options = OPTIONS[name].replace("MODEL", str(model)).replace("URL", url).split()
    return [name, "--data", data, "--output", output, *options, *more]


@pytest.mark.parametrize("name", OPTIONS)
def test_offline_command_connects_to_given_servers_alone(name, data, model, llm_server, tmp_path):
    server = llm_server(lambda body: "True")
    argv = arguments(name, data, tmp_path / "out", model, server.url, "--offline", "true")
    status, tried, variables, stderr = guarded(argv)
    assert (status, tried) == (0, []), stderr
    assert variables == ["1", "1", "1", "offline"]


@pytest.mark.parametrize("name", MODEL_COMMANDS)
def test_offline_command_does_not_ask_the_hub(name, data, tmp_path):
    (tmp_path / "c.yaml").write_text("offline: true\n")
    argv = arguments(name, data, tmp_path / "out", "some-org/some-model", "", "--config")
    status, tried, _, stderr = guarded([*argv, tmp_path / "c.yaml"])
    assert (status, tried) == (2, []), stderr


@pytest.mark.parametrize("name", OPTIONS)
def test_offline_data_is_not_looked_for_on_the_hub(name, model, tmp_path):
    argv = arguments(name, "some-org/some-data", tmp_path / "out", model, "http://127.0.0.1:9/v1")
    status, tried, _, stderr = guarded([*argv, "--offline", "true"])
    assert (status, tried) == (2, []), stderr


def test_the_variable_of_the_hub_is_enough(data, tmp_path):
    argv = arguments("sft", data, tmp_path / "out", "some-org/some-model", "")
    status, tried, variables, stderr = guarded(argv, HF_HUB_OFFLINE="1")
    assert (status, tried) == (2, []), stderr
    assert variables[1:3] == ["1", "1"]


def test_the_guard_sees_a_command_that_asks_the_hub(data, tmp_path):
    """Otherwise the tests above would show nothing."""
    argv = arguments("search", "some-org/some-data", tmp_path / "out", "", "http://127.0.0.1:9/v1")
    assert guarded(argv)[1]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("search", ["--llm.model", "m"]),
        ("ppo", ["--policy", "p", "--steps", "1", "--verifier.kind", "judge", "--llm.model", "m"]),
        ("eval", ["--endpoint", "chat", "--model", "m"]),
        ("verifier", ["--model", "m", "--llm.model", "m"]),
    ],
)
def test_offline_refuses_a_model_without_a_server(name, more, data, refused, tmp_path):
    argv = [name, "--data", data, "--output", tmp_path / "out", *more, "--offline", "true"]
    assert "no server is given for the model m" in refused(argv)


@pytest.mark.parametrize("path", ["runs/nosuch", "./x", "/nowhere/x", "~/x", "a/b/c"])
@pytest.mark.parametrize("name", MODEL_COMMANDS)
def test_mistyped_model_path_is_refused_at_once(name, path, data, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr("socket.socket.connect", pytest.fail)
    start = time.monotonic()
    assert f"model {path}: no such folder" in refused(
        arguments(name, data, tmp_path / "out", path, "")
    )
    assert time.monotonic() - start < 10


def test_mistyped_data_path_is_refused_at_once(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    argv = arguments("search", "runs/nosuch", tmp_path / "out", "", "http://127.0.0.1:9/v1")
    assert "data runs/nosuch: no such file" in refused(argv)


def test_credentials_of_a_url_are_written_nowhere(data, llm_server, tmp_path, capfd):
    """A user name, password and key in the server's address, in a run and in one that fails."""
    module = llm_server.module
    replies = iter([module.error(400, "no")] * 2)
    server = llm_server(lambda body: next(replies, "The answer is C."))
    url = server.url.replace("http://", "http://doctor:Secr3t@") + "?api_key=Secr3t"
    argv = ["eval", "--data", data, "--endpoint", "chat", "--model", "m", "--base_url", url]
    argv += ["--output", tmp_path / "out", "--llm.max_retries", "0"]
    cli.main([str(part) for part in argv])
    argv[argv.index(url)] = "http://doctor:Secr3t@127.0.0.1:9/v1?api_key=Secr3t"
    argv[argv.index(tmp_path / "out")] = tmp_path / "failed"
    with pytest.raises(SystemExit):
        cli.main([str(part) for part in argv])
    with pytest.raises(SystemExit):
        cli.main([str(part) for part in [*argv, "--print_config"]])
    shown = "".join(capfd.readouterr())
    assert "***" in shown
    assert "Secr3t" not in shown
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"***" in path.read_bytes() for path in files)
    assert not [path for path in files if b"Secr3t" in path.read_bytes()]
