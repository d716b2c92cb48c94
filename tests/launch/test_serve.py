"""`verippo serve start`, `status` and `stop`, with a small program in place of sglang."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from verippo.core.sampling.server import running, servers
from verippo.launch import cli
from verippo.launch.serve import ServeConfig, StatusConfig


@pytest.fixture
def serve(fake_sglang, tmp_path, capsys):
    """Runs `verippo serve WORD ...` in the test's state folder: (status, stdout lines, stderr)."""

    def run(word, *arguments):
        options = (
            [part for name, value in fake_sglang.items() for part in (f"--{name}", str(value))]
            if word == "start"
            else []
        )
        code = 0
        try:
            cli.main(["serve", word, *options, "--state", str(tmp_path / "state"), *arguments])
        except SystemExit as stopped:
            code = stopped.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    yield run
    run("stop", "--stop_timeout_seconds", "5")


def two_free_ports():
    """The first of two neighbouring free ports."""
    for _ in range(50):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            try:
                second.bind(("127.0.0.1", port := first.getsockname()[1] + 1))
            except (OSError, OverflowError):
                continue
            return port - 1
    raise AssertionError("no two free ports side by side")


def test_several_servers_are_started_listed_and_stopped(serve):
    port = two_free_ports()
    urls = [f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"]
    code, out, err = serve("start", "--num", "2", "--port", str(port))
    assert (code, err) == (0, "")
    assert out[-1] == f"--sampler.urls {urls[0]},{urls[1]}"

    code, out, _ = serve("status")
    assert code == 0
    assert [line.split()[:2] for line in out] == [[url, "ready"] for url in urls]

    code, _, err = serve("start", "--port", str(port))
    assert code == 2
    assert err.startswith(
        f"verippo: serve start: port {port}: a server of verippo is running there"
    )

    assert serve("stop", "--port", str(port)) == (0, [f"{urls[0]}  stopped"], "")
    assert [line.split()[0] for line in serve("status")[1]] == [urls[1]]
    assert serve("stop") == (0, [f"{urls[1]}  stopped"], "")
    assert serve("status") == (0, [], "")


def test_stop_does_not_wait_for_an_init_that_collects_no_zombies(fake_sglang, tmp_path):
    init = (  # adopts all orphans, as init does in a container
        "import ctypes, subprocess, sys; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0); "
        "serve = [sys.executable, '-m', 'verippo.launch.cli', 'serve']; "
        "[subprocess.run([*serve, *words.split()]) for words in sys.argv[1:]]"
    )
    options = " ".join(f"--{name} {value}" for name, value in fake_sglang.items())
    words = [f"start {options} --port 0 --state {tmp_path}", f"stop --state {tmp_path}"]
    begun = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", init, *words], capture_output=True, text=True)
    assert time.monotonic() - begun < 40
    assert ended.stdout.endswith("  stopped\n"), ended.stderr
    assert servers(str(tmp_path)) == []


def test_a_server_that_exits_gives_one_line_and_status_two(serve):
    code, _, err = serve("start", "--port", "0", "--environment", '{"FAKE": "exits"}')
    assert code == 2
    assert err.count("\n") == 1
    assert "RuntimeError: out of memory" in err


def test_a_missing_cpu_package_names_the_environment_to_use(serve):
    code, _, err = serve("start", "--port", "0", "--environment", '{"FAKE": "imports"}')
    assert code == 2
    assert err.count("\n") == 1
    assert "No module named 'torchvision'" in err
    assert (
        "`make test-sglang` installs: run it (again), and give --python .sglang/bin/python" in err
    )


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_in_the_foreground_a_signal_stops_the_servers(fake_sglang, tmp_path, sent, status):
    with foreground(fake_sglang, tmp_path) as process:
        server = started_by(process, tmp_path)
        assert process.poll() is None
        process.send_signal(sent)
        assert process.wait(20) == status
        assert not running(server)
        assert servers(str(tmp_path)) == []


@pytest.mark.parametrize(("stays", "status"), [("true", 0), ("false", 1)])
def test_a_signal_while_servers_are_loading_stops_them(fake_sglang, tmp_path, stays, status):
    with foreground(
        fake_sglang, tmp_path, "--environment", '{"FAKE": "hangs"}', "--foreground", stays
    ) as process:
        assert next(
            line for line in iter(process.stdout.readline, "") if line.startswith("starting")
        )
        while not (listed := servers(str(tmp_path))):
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait(20) == status
        assert not running(listed[0][0])


def test_in_the_foreground_a_server_that_exits_ends_the_command(fake_sglang, tmp_path):
    with foreground(fake_sglang, tmp_path) as process:
        server = started_by(process, tmp_path)
        os.kill(server.pid, signal.SIGKILL)
        assert process.wait(20) == 1
        assert process.stderr.read() == f"verippo: {server.url} exited unexpectedly: {server.log}\n"
        assert not running(server)


@contextmanager
def foreground(fake_sglang, state, *more):
    options = [part for name, value in fake_sglang.items() for part in (f"--{name}", str(value))]
    command = [
        sys.executable,
        "-m",
        "verippo.launch.cli",
        "serve",
        "start",
        *options,
        "--port",
        "0",
        "--foreground",
        "true",
    ]
    command += ["--state", str(state), *more]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # does nothing to one that has ended


def started_by(process, state):
    """The server that the command started, once it says so."""
    lines = iter(process.stdout.readline, "")
    assert next(line for line in lines if line.startswith("--sampler.urls"))
    ((server, _),) = servers(str(state))
    return server


def test_listening_on_all_interfaces_without_a_key_gives_a_warning(serve):
    code, out, err = serve("start", "--port", "0", "--host", "0.0.0.0")
    assert code == 0
    assert err.startswith(
        "warning: anyone who can reach this machine can replace the model's weights"
    )


def test_a_command_needs_no_options():
    assert cli.parse(StatusConfig, [], program="verippo serve status")[0] == StatusConfig()


def test_a_port_without_a_server_is_named(serve):
    code, _, err = serve("stop", "--port", "3")
    assert code == 2
    assert "port=3: there is no server of verippo; ports in use: none" in err


def test_each_server_has_its_own_gpus(monkeypatch):
    def gpus(**fields):
        return [
            c.environment.get("CUDA_VISIBLE_DEVICES")
            for c in ServeConfig(model="m", device="cuda", **fields).each()
        ]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus() == [None]
    assert gpus(num=2) == ["0", "1"]
    assert gpus(num=2, tp=2, gpus="4,5,6,7") == ["4,5", "6,7"]
    assert gpus(tp=2, gpus="4,5,6,7") == ["4,5"]
    assert [c.port for c in ServeConfig(model="m", num=3, port=9000).each()] == [9000, 9001, 9002]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert gpus(num=2) == ["3", "1"]
    with pytest.raises(ValueError, match=r"gpus=3,1: 2 servers with tp=1, dp=2 need 4 GPUs"):
        gpus(num=2, dp=2)


@pytest.mark.parametrize(
    ("fields", "message"), [({"num": 0, "model": "m"}, "num=0"), ({}, "give --model")]
)
def test_a_mistake_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ServeConfig(**fields)
