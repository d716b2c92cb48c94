"""`verippo serve` and the processes of a real sglang server."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from verippo.core.sampling.server import servers, stop
from verippo.launch import cli

pytestmark = pytest.mark.sglang


def generate(url, **headers):
    body = {
        "input_ids": [1, 5, 7],
        "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True},
    }
    content = {"Content-Type": "application/json"} | headers
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), content)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["output_ids"]


def alive(server):
    """Processes of the server that run; ended orphans stay listed until init collects them."""
    pids = {pid for pid, _ in server.processes}
    return [
        p
        for p in psutil.process_iter(["status"])
        if p.pid in pids and p.info["status"] != psutil.STATUS_ZOMBIE
    ]


def test_serve_starts_lists_refuses_a_second_start_and_stops_with_nothing_left(
    make_model, sglang_options, tmp_path, capsys
):
    environment = json.dumps(sglang_options["environment"])
    options = sglang_options | {
        "model": make_model("llama"),
        "state": tmp_path,
        "environment": environment,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    cli.main(["serve", "start", *arguments])
    url = capsys.readouterr().out.splitlines()[-1].removeprefix("--sampler.urls ")
    try:
        assert len(generate(url)) == 4
        ((server, state),) = servers(str(tmp_path))
        assert (server.url, state) == (url, "ready")
        assert len(server.processes) >= 3  # the server, its scheduler, its detokenizer
        with pytest.raises(SystemExit) as caught:
            cli.main(["serve", "start", *arguments, "--port", str(server.port)])
        assert caught.value.code == 2
        assert (
            f"port {server.port}: a server of verippo is running there (pid {server.pid}"
            in capsys.readouterr().err
        )
        assert len(generate(url)) == 4
        idle = sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid, _ in server.processes)
        time.sleep(3)
        assert (
            sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid, _ in server.processes) - idle
            < 1.0
        )
    finally:
        begun = time.monotonic()
        cli.main(["serve", "stop", "--state", str(tmp_path)])
    assert time.monotonic() - begun < 60
    assert capsys.readouterr().out == f"{url}  stopped\n"
    assert not alive(server)
    with socket.socket() as free:
        free.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as servers do: old connections may linger
        free.bind(("127.0.0.1", server.port))
    cli.main(["serve", "status", "--state", str(tmp_path)])
    assert capsys.readouterr().out == ""


def test_the_key_guards_a_real_server_and_a_killed_one_leaves_no_children(
    make_model, start_sglang, tmp_path
):
    (tmp_path / "key").write_text("sesame-7c1\n")
    state = str(tmp_path / "state")
    server = start_sglang(make_model("llama"), api_key_file=str(tmp_path / "key"), state=state)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        generate(server.url)
    assert len(generate(server.url, Authorization="Bearer sesame-7c1")) == 4
    listed = [" ".join(psutil.Process(pid).cmdline()) for pid, _ in server.processes]
    written = [path.read_text() for path in Path(state).iterdir()]
    assert not [text for text in [*listed, *written] if "sesame" in text]
    assert "'api_key': '**********'" in Path(server.log).read_text()

    os.kill(server.pid, signal.SIGKILL)
    stop(server, timeout_seconds=20)
    assert not alive(server)
