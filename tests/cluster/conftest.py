"""Hosts made of network namespaces: addresses, links that can be cut, processes of their own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

FOLDER = Path(__file__).parent
PORT = 29500
SAMPLER = 3
"""Number of the host that samples."""
SAMPLER_PORT = 30000
LINE = re.compile(r"verippo: rank \d+ stops: .*$", re.MULTILINE)
"""Not only at the start of a line: a progress bar of another rank may stand there."""


def _fault_fixtures() -> Any:
    """The fixtures of tests/fault that start and compare small runs."""
    path = FOLDER.parent / "fault" / "conftest.py"
    spec = importlib.util.spec_from_file_location("fault_conftest", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_fault = _fault_fixtures()
runs, rows_of, check_same = _fault.runs, _fault.rows_of, _fault.check_same


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker("cluster")


class Program(NamedTuple):
    """A command started on a host, and the file of what it prints."""

    process: subprocess.Popen[bytes]
    output: Path

    def lines(self) -> list[str]:
        """The lines that verippo printed about its end."""
        return LINE.findall(self.output.read_text(errors="replace"))


class Network:
    """Hosts 10.77.0.1, 10.77.0.2, ... on one switch; each is a network namespace."""

    def __init__(self, num_hosts: int, folder: Path) -> None:
        self.prefix = f"verippo-{os.getpid()}"
        self.folder = folder
        self.num_hosts = num_hosts
        self.programs: list[Program] = []
        self.path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        switch = f"{self.prefix}-switch"
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "name", "bridge0", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge0", "up")
        for n in range(num_hosts):
            host, port = self.name(n), f"port{n}"
            ip("netns", "add", host)
            ip(
                *f"link add eth0 netns {host} type veth peer name {port} netns {switch}".split(),
            )
            ip("-n", switch, "link", "set", port, "master", "bridge0", "up")
            ip("-n", host, "addr", "add", f"{self.address(n)}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")
            ip("-n", host, "link", "set", "lo", "up")

    def name(self, host: int) -> str:
        """Name of a host, which is that of its namespace."""
        return f"{self.prefix}-{host}"

    def address(self, host: int) -> str:
        """Its address."""
        return f"10.77.0.{host + 1}"

    def start(self, host: int, *command: str, **environment: str) -> Program:
        """Starts a command on a host."""
        output = self.folder / f"{len(self.programs)}-host-{host}.txt"
        own_name = ["unshare", "--uts", "sh", "-c", f'hostname {self.name(host)}; exec "$@"', "sh"]
        defaults = {"GLOO_SOCKET_IFNAME": "eth0", "PATH": self.path, "NAMESPACES": self.prefix}
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name(host), *own_name, *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | defaults | environment,
            )
        self.programs.append(Program(process, output))
        return self.programs[-1]

    def processes(self, host: int) -> list[psutil.Process]:
        """All processes on a host."""
        found = []
        for pid in ip("netns", "pids", self.name(host)).split():
            with contextlib.suppress(psutil.Error):
                found.append(psutil.Process(int(pid)))
        return found

    def rank_on(self, host: int) -> psutil.Process:
        """The process of the only rank on a host."""
        (found,) = [
            process
            for process in self.processes(host)
            if "verippo.launch.cli" in process.cmdline() and "RANK" in process.environ()
        ]
        return found

    def cut(self, host: int) -> None:
        """Cuts the link between a host and the switch."""
        ip("-n", f"{self.prefix}-switch", "link", "set", f"port{host}", "down")

    def signal_all(self, host: int, number: int) -> None:
        """Sends a signal to every process on a host."""
        for process in self.processes(host):
            process.send_signal(number)

    def restore(self) -> None:
        """Kills every process on the hosts of ranks, and mends the links."""
        for host in range(SAMPLER):
            for process in self.processes(host):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            ip("-n", f"{self.prefix}-switch", "link", "set", f"port{host}", "up")

    def remove(self) -> None:
        """Removes everything."""
        for name in ip("netns", "list").split():
            if name.startswith(f"{self.prefix}-"):
                remove_namespace(name)


def ip(*arguments: str) -> str:
    """Runs iproute2's `ip` and returns what it prints."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def remove_namespace(name: str) -> None:
    """Removes a network namespace, its processes and its links."""
    with contextlib.suppress(AssertionError):
        for pid in ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        ip("netns", "del", name)


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skips the test where network namespaces cannot be made; removes those of killed test runs."""
    probe = f"verippo-{os.getpid()}-probe"
    try:
        ip("netns", "add", probe)
        ip("netns", "exec", probe, "unshare", "--uts", "true")
        for name, pid in re.findall(r"^(verippo-(\d+)-\w+)", ip("netns", "list"), re.MULTILINE):
            if name == probe or not psutil.pid_exists(int(pid)):
                remove_namespace(name)
    except (OSError, AssertionError) as error:
        pytest.skip(f"network namespaces cannot be made here (root and iproute2 needed): {error}")


@pytest.fixture(scope="session")
def cluster(
    namespaces: None, runs: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Network]:
    """Three hosts for ranks, and a fourth one that samples."""
    network = Network(4, tmp_path_factory.mktemp("programs"))
    try:
        server = [str(FOLDER / "sampler_server.py"), network.address(SAMPLER), str(SAMPLER_PORT)]
        program = network.start(SAMPLER, sys.executable, *server, str(runs.model))
        wait_until(lambda: "ready" in program.output.read_text(), program)
        yield network
    finally:
        network.remove()


@pytest.fixture
def network(cluster: Network) -> Iterator[Network]:
    """The cluster, with no program on the hosts of ranks and every link up."""
    cluster.restore()
    yield cluster
    cluster.restore()


def wait_until(condition: Callable[[], bool], *programs: Program, seconds: float = 900.0) -> None:
    """Waits for a condition while programs run."""
    deadline = time.monotonic() + seconds
    while not condition():
        for program in programs:
            assert program.process.poll() is None, program.output.read_text()[-4000:]
        assert time.monotonic() < deadline, [p.output.read_text()[-2000:] for p in programs]
        time.sleep(0.05)


@pytest.fixture(scope="session")
def launch(
    cluster: Network, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[Program]]:
    """Starts `verippo ARGUMENTS` with one rank on each of some hosts: `launch(kind, num, argv)`."""
    folder = tmp_path_factory.mktemp("launch")
    text = "import time\ndef score(rollouts):\n    time.sleep(0.2)\n"
    text += "    return [sum(r.response_ids) % 7 / 7 for r in rollouts]\n"
    (folder / "scoring.py").write_text(text)
    stand_ins = {"PYTHONPATH": str(folder), "PATH": f"{FOLDER / 'bin'}:{cluster.path}"}

    def torchrun(num_hosts: int, argv: list[str]) -> list[Program]:
        options = ["--nnodes", str(num_hosts), "--nproc_per_node", "1"]
        options += ["--master_addr", cluster.address(0), "--master_port", str(PORT)]
        return [
            cluster.start(
                host,
                *(sys.executable, "-m", "torch.distributed.run", *options),
                *("--node_rank", str(host), "-m", "verippo.launch.cli", *argv),
                **stand_ins,
            )
            for host in range(num_hosts)
        ]

    def deepspeed(num_hosts: int, argv: list[str]) -> list[Program]:
        lines = [f"{cluster.address(host)} slots=1\n" for host in range(num_hosts)]
        hostfile = folder / f"hosts-{num_hosts}"
        hostfile.write_text("".join(lines))
        options = ["--hostfile", str(hostfile), "--master_port", str(PORT), "--no_local_rank"]
        options += ["--master_addr", cluster.address(0), "--module", "verippo.launch.cli"]
        command = [sys.executable, "-m", "verippo.launch.deepspeed", *options, *argv]
        return [cluster.start(0, *command, **stand_ins)]

    return lambda kind, *arguments: {"torchrun": torchrun, "deepspeed": deepspeed}[kind](*arguments)


@pytest.fixture(scope="session")
def arguments(runs: Any) -> Callable[..., list[str]]:
    """Arguments of a PPO run that samples on the fourth host: `arguments(output, **changes)`."""
    options = {
        "steps": 6,
        "save_every": 2,
        "eval_fraction": 0.0,
        "verifier.kind": "function",
        "verifier.function": "scoring:score",
        "sampler.kind": "sglang",
        "sampler.urls": f"http://10.77.0.{SAMPLER + 1}:{SAMPLER_PORT}",
        "sampler.sync": "disk",
    }
    return lambda output, **changes: runs.arguments("ppo", output, **options | changes)


@pytest.fixture(scope="session")
def unbroken(
    cluster: Network,
    launch: Callable[..., list[Program]],
    arguments: Callable[..., list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[int], Path]:
    """Folder of an uninterrupted run on that many hosts."""
    made: dict[int, Path] = {}

    def folder(num_hosts: int) -> Path:
        if num_hosts not in made:
            made[num_hosts] = tmp_path_factory.mktemp("unbroken") / "run"
            cluster.restore()
            _finish(launch("torchrun", num_hosts, arguments(made[num_hosts])))
        return made[num_hosts]

    return folder


def _finish(programs: list[Program], seconds: float = 900.0) -> None:
    """Waits until programs have ended without an error."""
    for program in programs:
        program.process.wait(timeout=seconds)
    for program in programs:
        assert program.process.returncode == 0, program.output.read_text()[-4000:]


@pytest.fixture(scope="session")
def wait_for_steps() -> Callable[[Path, int, list[Program]], None]:
    """Waits until a run has written a number of steps."""

    def wait(folder: Path, number: int, programs: list[Program]) -> None:
        file = folder / "metrics.jsonl"
        wait_until(lambda: file.exists() and file.read_text().count("\n") >= number, *programs)

    return wait


@pytest.fixture(scope="session")
def finish() -> Callable[[list[Program]], None]:
    """Waits until programs have ended without an error."""
    return _finish
