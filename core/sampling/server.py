"""Starts sglang servers as processes, waits for them, records them and stops them.

Each server has a record `STATE/NODE-PORT.json`, with the fields of a Server, and a log
`STATE/NODE-PORT.log`. A process is only signalled if both its number and its start are those
recorded, since the system may have given the number to another process. sglang is never imported:
the interpreter that runs it may belong to another environment.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from ..files import replace_file
from ..http_library import httpx
from .server_command import (
    STATE,
    ServerConfig,
    check_model,
    launch_command,
    launch_environment,
    read_api_key,
)

MISSING_ON_CPU = r"No module named '(torchvision|sgl_kernel)|torchvision::nms|could not load .*_ops"
"""Errors of an sglang without the packages, or the stand-ins for them, that a CPU needs."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Record of a started server."""

    node: str
    """Name of the machine."""
    host: str
    """Address on which the server listens."""
    port: int
    model: str
    log: str
    """Absolute path of the log; the record is beside it."""
    command: list[str]
    processes: list[tuple[int, str]]
    """Number and start (see `start_mark`) of the server's process; once ready, of its children
    too."""

    @property
    def pid(self) -> int:
        """Number of the server's own process."""
        return self.processes[0][0]

    @property
    def url(self) -> str:
        """Address for clients, on other nodes too if the server listens on all interfaces."""
        return f"http://{self.node if self.host == '0.0.0.0' else self.host}:{self.port}"

    @property
    def record(self) -> Path:
        """File that holds this record."""
        return Path(self.log).with_suffix(".json")

    @property
    def key_file(self) -> Path:
        """Configuration file that gives the API key to the starting server."""
        return Path(self.log).with_suffix(".yaml")


def start(config: ServerConfig) -> Server:
    """Starts one server and waits until it answers; see `start_all`."""
    return start_all([config])[0]


def start_all(configs: Sequence[ServerConfig]) -> list[Server]:
    """Starts servers at the same time and waits until all answer.

    If one fails to start, or on an interrupt, all of them are stopped.

    Args:
        configs: one configuration for each server.

    Returns:
        The servers, in order.

    Raises:
        ValueError: a port is taken, a model or API key cannot be read, or a server exits or does
            not answer in time; the message has the last lines of its log.
    """
    started: list[Server] = []
    try:
        for config in configs:
            _spawn(config, started)
        return [_wait(server, config) for server, config in zip(started, configs, strict=True)]
    except BaseException:
        for server in started:
            stop(server, timeout_seconds=5)
        raise


@contextmanager
def serving(config: ServerConfig) -> Iterator[Server]:
    """Runs a server for the duration of a `with` block."""
    server = start(config)
    try:
        yield server
    finally:
        stop(server, timeout_seconds=config.stop_timeout_seconds)


def stop(server: Server, *, timeout_seconds: float = 60.0) -> bool:
    """Stops a server and its children, waits for their end and removes the record.

    Args:
        server: the server, on this node.
        timeout_seconds: time to finish running requests after SIGTERM; what is left is killed.

    Returns:
        Whether any of its processes was running.

    Raises:
        ValueError: the server runs on another node.
    """
    if server.node != platform.node():
        raise ValueError(f"the server {server.url} runs on {server.node}: stop it there")
    processes = running(server)
    # the server's own process stops its children
    for process in [p for p in processes if p.pid == server.pid] or processes:
        with suppress(psutil.Error):
            process.terminate()  # psutil compares the start time again
    remaining = _wait_for_end(processes, timeout_seconds)
    for process in {*remaining, *running(server)}:
        with suppress(psutil.Error):
            process.kill()
    _wait_for_end(remaining, 10.0)
    server.record.unlink(missing_ok=True)
    server.key_file.unlink(missing_ok=True)
    return bool(processes)


def servers(state: str = STATE) -> list[tuple[Server, str]]:
    """Lists the recorded servers.

    Args:
        state: folder of the records.

    Returns:
        Each server with "ready", "not answering" (it is starting, or hangs), "gone" (it ended
        without being stopped) or "elsewhere" (it belongs to another node).
    """
    found = []
    for server in map(_read_record, sorted(Path(state).expanduser().glob("*.json"))):
        if server.node != platform.node():
            found.append((server, "elsewhere"))
        elif not running(server):
            found.append((server, "gone"))
        else:
            found.append((server, "ready" if _answers(server, None) else "not answering"))
    return found


def running(server: Server) -> list[psutil.Process]:
    """Processes of a server that are running.

    Returns:
        Every process in the session of the server's own process, itself first. If its own process
        is gone, the session's number may belong to another program: then the recorded ones only.
    """
    found = {}
    for pid, mark in server.processes:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            if start_mark(pid) == mark:
                found[pid] = process
    if server.pid in found:
        for process in psutil.process_iter():
            with suppress(OSError):
                if os.getsid(process.pid) == server.pid:
                    found[process.pid] = process
    return _alive(found.values())


def start_mark(pid: int) -> str:
    """Marks when a process started: the system's boot, and clock ticks since then.

    Unlike a time of day it stays the same when the clock is set. Empty if there is no such process.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():  # not Linux
        return str(psutil.Process(pid).create_time())
    try:
        # the name, in brackets, may hold spaces; field 22 is the start
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return f"{boot.read_text().strip()}/{fields[22 - 3]}"


def has_exited(server: Server) -> bool:
    """Whether the server's own process has ended."""
    return server.pid not in [process.pid for process in running(server)]


def _alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Processes that have not ended. Own children that have ended are collected.

    Orphans that have ended count as ended too: only init can collect them, and in a container it
    may not.
    """
    alive = []
    for process in processes:
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                process.wait(timeout=0)
            else:
                alive.append(process)
    return alive


def _wait_for_end(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Waits until all processes have ended, or for `seconds`; returns those still running."""
    deadline = time.monotonic() + seconds
    while (remaining := _alive(processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return remaining


def _spawn(config: ServerConfig, started: list[Server]) -> None:
    """Starts and records a server, and appends it to the list of those that a failure stops."""
    model = check_model(config.model)
    key = read_api_key(config)
    folder = Path(config.state).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ValueError(
            f"state={config.state}: the folder cannot be created: {error.strerror}"
        ) from None
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two commands at once could find the same port free
        port = config.port or _free_port(config.host, 0)
        record = folder / f"{platform.node()}-{port}.json"
        if record.exists() and running(other := _read_record(record)):
            raise ValueError(
                f"port {port}: a server of verippo is running there (pid {other.pid}, "
                f"{other.model}): stop it with `verippo serve stop`, or use another --port"
            )
        _free_port(config.host, port)
        server = Server(
            node=platform.node(),
            host=config.host,
            port=port,
            model=model,
            log=str(record.with_suffix(".log")),
            command=launch_command(config, model, port),
            processes=[],
        )
        server = _launch(server, config, key)
        started.append(server)  # first: a reader of the record may signal this process at once
        _write_record(server)


def _launch(server: Server, config: ServerConfig, key: str | None) -> Server:
    """Starts the server's process. Returns the server with its process."""
    command = server.command
    if key:  # in a private file: every user can read a command line
        command = [*command, "--config", str(server.key_file)]
        with open(server.key_file, "w", opener=_open_private) as file:
            file.write(f"api-key: {json.dumps(key)}\n")
    Path(server.log).unlink(missing_ok=True)
    with open(server.log, "ab", opener=_open_private) as log:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=launch_environment(config),
            )
        except OSError as error:
            server.key_file.unlink(missing_ok=True)
            raise ValueError(f"python={command[0]}: cannot be run: {error.strerror}") from None
    processes = [(process.pid, start_mark(process.pid))]
    return replace(server, command=command, processes=processes)


def _wait(server: Server, config: ServerConfig) -> Server:
    """Waits until the server answers. Returns it with its children, and records them."""
    key = read_api_key(config)
    deadline = time.monotonic() + config.start_timeout_seconds
    problem = ""
    try:
        while not problem and not _answers(server, key):
            if has_exited(server):
                problem = "exited while starting"
            elif time.monotonic() > deadline:
                limit = config.start_timeout_seconds
                problem = f"did not answer within start_timeout_seconds={limit:g}"
            else:
                time.sleep(0.5)
    finally:
        server.key_file.unlink(missing_ok=True)
        if key:
            _mask_key(server.log, key.encode())
    if problem:
        raise ValueError(f"the server on port {server.port} {problem}: {_last_lines(server.log)}")
    processes = [(process.pid, start_mark(process.pid)) for process in running(server)]
    ready = replace(server, processes=processes)
    _write_record(ready)
    return ready


def _answers(server: Server, key: str | None) -> bool:
    host = "127.0.0.1" if server.host == "0.0.0.0" else server.host
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for path in ("model_info", "get_model_info"):  # the second in older versions
        url = f"http://{host}:{server.port}/{path}"
        try:
            status = httpx.get(url, headers=headers, timeout=5, trust_env=False).status_code
        except httpx.HTTPError:
            return False
        if status != 404:
            return status < 400 or status in (401, 403)  # the key may be unknown here
    return False


def _mask_key(log: str, key: bytes) -> None:
    """Masks the API key in a log: sglang prints its settings when it starts."""
    with open(log, "r+b") as file:
        for match in re.finditer(re.escape(key), file.read()):
            file.seek(match.start())
            file.write(b"*" * len(key))


def _last_lines(log: str) -> str:
    text = Path(log).read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text[-20_000:].splitlines() if line.strip()]
    summary = f"{' | '.join(lines[-4:])[-700:] or 'the log is empty'} (full log: {log})"
    if "No module named 'sglang'" in text:
        summary += "; give --python, the interpreter of an environment that has sglang"
    elif re.search(MISSING_ON_CPU, text):
        summary += (
            "; without a GPU, sglang needs the environment that `make test-sglang` installs: "
            "run it (again), and give --python .sglang/bin/python"
        )
    return summary


def _free_port(host: str, port: int) -> int:
    """Checks that the port is free; port 0 stands for any. Returns the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"host={host} port={port}: cannot listen there ({error.strerror}): "
                "use another --port"
            ) from None
        return probe.getsockname()[1]


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _read_record(path: Path) -> Server:
    try:
        server = Server(**json.loads(path.read_text()))
        processes = [(int(pid), str(mark)) for pid, mark in server.processes]
        return replace(server, processes=processes)
    except (ValueError, TypeError):
        raise ValueError(f"{path}: not the record of a server: remove the file") from None


def _write_record(server: Server) -> None:
    replace_file(server.record, json.dumps(asdict(server), indent=1))
