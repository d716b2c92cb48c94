"""Server processes, with a small program in place of sglang."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from verippo.core.sampling import server as module
from verippo.core.sampling.server import servers, serving, start, start_all, stop
from verippo.core.sampling.server_command import ServerConfig, launch_command, launch_environment


@pytest.fixture
def make(fake_sglang, tmp_path):
    """Makes a configuration of the fake server; `fault` selects its misbehaviour."""

    def config(fault="", **fields):
        environment = {"FAKE": fault} | fields.pop("environment", {})
        plain = (
            {"state": str(tmp_path / "state"), "port": 0, "stop_timeout_seconds": 10.0}
            | fake_sglang
            | fields
        )
        return ServerConfig(**plain, environment=environment)

    yield config
    for record in (tmp_path / "state").glob("*.json"):
        stop(module._read_record(record), timeout_seconds=0)


def running(server):
    return {
        pid
        for pid, _ in server.processes
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"
    }


def listens(server):
    with socket.socket() as probe:
        return probe.connect_ex((server.host, server.port)) == 0


def test_a_started_server_answers_and_a_stopped_one_leaves_nothing(make):
    config = make()
    server = start(config)
    assert servers(config.state) == [(server, "ready")]
    assert len(running(server)) == 2  # itself and its child
    boot, ticks = server.processes[0][1].split("/")
    seconds = int(ticks) / os.sysconf("SC_CLK_TCK")
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert 0 <= time.clock_gettime(time.CLOCK_BOOTTIME) - seconds < 60
    assert server.url == f"http://127.0.0.1:{server.port}"
    with urllib.request.urlopen(f"{server.url}/model_info") as answer:
        assert json.load(answer) == {"model_path": config.model}

    assert stop(server)
    assert not running(server)
    assert not listens(server)
    assert servers(config.state) == []
    assert not stop(server)


def test_readiness_ignores_proxies_and_knows_the_older_route(make, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving(make("old")) as server:
        assert listens(server)


def test_a_server_that_exits_is_reported_with_its_last_lines(make):
    config = make("exits")
    begun = time.monotonic()
    with pytest.raises(
        ValueError, match="exited while starting: .*RuntimeError: out of memory .*full log: .*log"
    ):
        start(config)
    assert time.monotonic() - begun < 5
    assert servers(config.state) == []


def test_an_interpreter_without_sglang_is_named_with_what_to_do(make):
    with pytest.raises(
        ValueError,
        match=r"No module named 'sglang'.*; give --python, the interpreter of an environment that",
    ):
        start(make(python=sys.executable))


def test_a_relative_state_folder_is_found_from_elsewhere(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server = start(make(state="state"))
    assert Path(server.log).is_absolute()
    monkeypatch.chdir("/")
    assert servers(str(tmp_path / "state")) == [(server, "ready")]
    monkeypatch.chdir(tmp_path)
    assert stop(server)


def test_a_server_that_never_answers_is_stopped_after_the_timeout(make):
    config = make("hangs", start_timeout_seconds=1.0)
    with pytest.raises(
        ValueError, match=r"did not answer within start_timeout_seconds=1: .*server_args="
    ):
        start(config)
    assert servers(config.state) == []
    assert not [p for p in psutil.Process().children(recursive=True) if p.status() != "zombie"]


def test_an_interrupt_while_waiting_stops_the_servers(make, monkeypatch):
    config, sleep = make("hangs"), time.sleep

    def interrupted(seconds):
        monkeypatch.setattr(module.time, "sleep", sleep)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(config)
    assert servers(config.state) == []
    assert not [p for p in psutil.Process().children(recursive=True) if p.status() != "zombie"]


def test_if_one_of_several_servers_fails_all_are_stopped(make):
    configs = [make(), make("exits")]
    with pytest.raises(ValueError, match="exited while starting"):
        start_all(configs)
    assert servers(configs[0].state) == []


def test_a_second_start_on_a_port_is_refused(make):
    server = start(make())
    with pytest.raises(
        ValueError,
        match=rf"port {server.port}: a server of verippo is running there \(pid {server.pid}, ",
    ):
        start(make(port=server.port))
    assert listens(server)


def test_of_two_starts_at_once_on_a_port_one_succeeds(make):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        config = make(port=probe.getsockname()[1])
    with ThreadPoolExecutor(2) as pool:
        results = [
            future.exception() or future.result()
            for future in [pool.submit(start, config) for _ in range(2)]
        ]
    refused = [result for result in results if isinstance(result, ValueError)]
    assert len(refused) == 1
    assert "a server of verippo is running there" in str(refused[0])
    (server,) = [result for result in results if result not in refused]
    assert servers(config.state) == [(server, "ready")]


def test_a_port_that_another_program_holds_is_refused(make):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            ValueError,
            match=rf"port={port}: cannot listen there \(Address already in use\): use another",
        ):
            start(make(port=port))


def test_a_killed_server_is_gone_and_its_port_can_be_reused(make):
    config = make()
    server = start(config)
    for pid, _ in server.processes:
        os.kill(pid, signal.SIGKILL)
    psutil.wait_procs(
        [psutil.Process(pid) for pid, _ in server.processes if psutil.pid_exists(pid)], timeout=5
    )
    assert servers(config.state) == [(server, "gone")]
    again = start(make(port=server.port))
    assert again.pid != server.pid
    assert servers(config.state) == [(again, "ready")]


def test_children_that_outlive_their_server_are_stopped(make):
    config = make()
    server = start(config)
    os.kill(server.pid, signal.SIGKILL)
    psutil.Process(server.pid).wait(5)
    assert len(running(server)) == 1
    assert servers(config.state) == [(server, "not answering")]
    assert stop(server)
    assert not running(server)


def test_a_killed_server_leaves_no_zombie(make):
    config = make()
    server = start(config)
    os.kill(server.pid, signal.SIGKILL)
    while (
        psutil.Process(server.pid).status() != psutil.STATUS_ZOMBIE
    ):  # ended, and nobody has asked how
        time.sleep(0.01)
    assert stop(server)
    assert not psutil.pid_exists(server.pid)


def test_a_server_that_ignores_sigterm_is_killed(make):
    config = make("stubborn")
    server = start(config)
    assert stop(server, timeout_seconds=0.5)
    assert not running(server)
    assert not listens(server)


def test_a_process_number_that_was_reused_is_not_signalled(make):
    config = make()
    server = start(config)
    stop(server)
    with subprocess.Popen(
        [sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    ) as other:
        boot, ticks = module.start_mark(other.pid).split("/")
        earlier = f"{boot}/{int(ticks) - 1}"
        fields = module.asdict(server) | {"processes": [(other.pid, earlier)]}
        server.record.write_text(json.dumps(fields))
        ((record, state),) = servers(config.state)
        assert state == "gone"
        assert not stop(record)
        assert other.poll() is None
        assert servers(config.state) == []
        other.communicate(b"\n", timeout=10)


def test_a_server_on_another_node_is_listed_and_not_stopped(make):
    config = make()
    server = start(config)
    stop(server)
    other = module.replace(server, node="another-node", host="0.0.0.0")
    module._write_record(other)
    assert servers(config.state) == [(other, "elsewhere")]
    assert other.url == f"http://another-node:{server.port}"
    with pytest.raises(ValueError, match=r"runs on another-node: stop it there"):
        stop(other)
    other.record.unlink()


def test_the_key_is_required_and_written_nowhere(make, tmp_path, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "sesame-7c1")
    config = make(api_key_env="SERVER_KEY")
    server = start(config)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{server.url}/model_info")
    assert servers(config.state) == [(server, "ready")]
    listed = [" ".join(p.cmdline()) for p in map(psutil.Process, running(server))]
    written = [path.read_text() for path in (tmp_path / "state").iterdir()]
    assert len(written) == 3  # lock, record, log: the file that carried the key is gone
    assert not [text for text in [*listed, *written] if "sesame" in text]
    assert "'api_key': '**********'" in Path(server.log).read_text()
    assert Path(server.log).stat().st_mode & 0o077 == 0
    assert "SERVER_KEY" not in Path(server.log).read_text()  # and not in its environment


def test_the_key_is_in_no_message(make, tmp_path):
    (tmp_path / "key").write_text("sesame-7c1\n")
    with pytest.raises(ValueError, match="exited while starting") as caught:
        start(make("exits", api_key_file=str(tmp_path / "key")))
    assert "sesame" not in str(caught.value)
    assert {path.suffix for path in (tmp_path / "state").iterdir()} == {"", ".log"}


def test_stopping_a_server_whose_start_was_killed_removes_the_key(make, tmp_path):
    (tmp_path / "key").write_text("sesame-7c1\n")
    config = make("hangs", api_key_file=str(tmp_path / "key"))
    module._spawn(config, started := [])
    (server,) = started
    (carrier,) = (tmp_path / "state").glob("*.yaml")
    assert carrier.stat().st_mode & 0o077 == 0
    assert stop(server, timeout_seconds=0)
    assert {path.suffix for path in (tmp_path / "state").iterdir()} == {"", ".log"}


def test_variables_of_rank_launchers_are_not_inherited(make, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "0")
    with serving(make(environment={"MINE": "1"})) as server:
        names = Path(server.log).read_text()
    assert "'MINE'" in names
    assert "'PYTHONSAFEPATH'" in names
    assert not [name for name in ("RANK", "WORLD_SIZE", "MASTER", "TORCHELASTIC") if name in names]


def test_sglang_is_told_to_run_on_cpu(make):
    assert launch_environment(make(device="cpu"))["SGLANG_USE_CPU_ENGINE"] == "1"
    assert "SGLANG_USE_CPU_ENGINE" not in launch_environment(make(device="cuda"))
    own = make(device="cpu", environment={"SGLANG_USE_CPU_ENGINE": "0"})
    assert launch_environment(own)["SGLANG_USE_CPU_ENGINE"] == "0"


def test_fields_become_sglangs_arguments(make):
    fields = {
        "port": 1,
        "tp": 2,
        "dp": 3,
        "mem_fraction": 0.5,
        "device": "cuda",
        "arguments": "--log-level 'very quiet'",
    }
    command = " ".join(launch_command(make(**fields), "MODEL", 1)[1:])
    assert command == (
        "-m sglang.launch_server --model-path MODEL --host 127.0.0.1 --port 1 --tp-size 2 "
        "--dp-size 3 --mem-fraction-static 0.5 --log-level very quiet"
    )
    on_cpu = launch_command(make(device="cpu", mem_fraction=0.7), "MODEL", 1)
    assert on_cpu.index("cpu") < len(on_cpu) - on_cpu[::-1].index(
        "0.7"
    )  # the configured arguments come last and take precedence


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "/no/such/folder"}, "model='/no/such/folder': no model there"),
        ({"model": "no-such-folder"}, "model='no-such-folder': no model there"),
        ({"model": "."}, "config.json is missing"),
        ({"python": "/no/python"}, "python=/no/python: cannot be run: No such file"),
        ({"api_key_env": "NO_SUCH_KEY"}, "api_key_env=NO_SUCH_KEY: the key is empty or not set"),
        ({"api_key_file": os.devnull}, "api_key_file=/dev/null: the key is empty or not set"),
        ({"api_key_file": "/no/key"}, "api_key_file=/no/key: cannot be read: No such file"),
        ({"host": "192.0.2.1"}, "host=192.0.2.1 port=[0-9]+: cannot listen there"),
        ({"state": os.devnull}, "state=/dev/null: the folder cannot be created: File exists"),
        ({"arguments": "--log-level 'quiet"}, "No closing quotation"),
        ({"port": 70000}, "port=70000: must be"),
        ({"tp": 0}, "tp=0: must be at least 1"),
        ({"mem_fraction": 1.5}, "mem_fraction=1.5: must be between"),
        ({"api_key_env": "A", "api_key_file": "b"}, "api_key_env and api_key_file: give one"),
    ],
)
def test_a_mistake_is_named(make, fields, message):
    with pytest.raises(ValueError, match=message):
        start(make(**fields))


def test_a_broken_record_is_named(tmp_path):
    (tmp_path / f"{platform.node()}-1.json").write_text('{"node": 1')
    with pytest.raises(ValueError, match=r"-1\.json: not the record of a server: remove the file"):
        servers(str(tmp_path))
