"""sglang servers as processes of ours: started, waited for, recorded, and stopped with all their children.

Every server has `STATE/NODE-PORT.json` (the fields of a Server) and `STATE/NODE-PORT.log`. A process counts as ours only
when both its number and its start time are those recorded: a number that the system gave to another process since is never
signalled. sglang is never imported: its interpreter may be another environment's.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from .server_command import (
    STATE,
    ServerConfig,
    check_model,
    launch_command,
    launch_environment,
    read_api_key,
)

DIRECT = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # a proxy has no business on the way to our own port


@dataclass(frozen=True, kw_only=True)
class Server:
    """A started server: what its record holds."""

    node: str
    """name of the machine it runs on"""
    host: str
    port: int
    model: str
    log: str
    command: list[str]
    processes: list[tuple[int, float]]
    """(number, start in seconds since 1970) of the server's process, then of its children once it is ready"""

    @property
    def pid(self) -> int:
        return self.processes[0][0]

    @property
    def url(self) -> str:
        """Where clients find it, those on other nodes included if it listens for them."""
        return f"http://{self.node if self.host == '0.0.0.0' else self.host}:{self.port}"


def start(config: ServerConfig) -> Server:
    """Starts one server and waits until it answers; see `start_all`."""
    return start_all([config])[0]


def start_all(configs: Sequence[ServerConfig]) -> list[Server]:
    """Starts servers side by side and waits until all answer; if one does not come up, or on an interrupt, stops them all.

    Raises ValueError when a port is taken, a model or a key is not there, a server exits (with its log's last lines) or does
    not answer in time.
    """
    started: list[Server] = []
    try:
        for config in configs:
            _spawn(config, started)
        return [_wait(server, config) for server, config in zip(started, configs, strict=True)]
    except BaseException:
        for server, config in zip(started, configs, strict=False):
            stop(server, state=config.state, timeout_seconds=5)
        raise


@contextmanager
def serving(config: ServerConfig) -> Iterator[Server]:
    """A server for the length of a `with` block."""
    server = start(config)
    try:
        yield server
    finally:
        stop(server, state=config.state, timeout_seconds=config.stop_timeout_seconds)


def stop(server: Server, *, state: str = STATE, timeout_seconds: float = 60.0) -> bool:
    """Ends the server, waits until it and its children are gone, and removes its record. Returns whether anything ran.

    SIGTERM lets it finish its requests; what is left after `timeout_seconds` is killed.
    """
    if server.node != platform.node():
        raise ValueError(f"the server {server.url} runs on {server.node}: stop it there")
    ours = running(server)
    for process in [
        p for p in ours if p.pid == server.pid
    ] or ours:  # the server's own process ends its children
        with suppress(psutil.Error):
            process.terminate()  # psutil compares the start time again before it signals
    left = _outlasting(ours, timeout_seconds)
    for process in {*left, *running(server)}:
        with suppress(psutil.Error):
            process.kill()
    _outlasting(left, 10.0)
    record = _record(server.node, server.port, state)
    for file in (record, record.with_suffix(".yaml")):
        file.unlink(missing_ok=True)
    return bool(ours)


def servers(state: str = STATE) -> list[tuple[Server, str]]:
    """Every recorded server with its state: "ready", "not answering" (it starts, or hangs), "gone" (it ended without being
    stopped), or "elsewhere" (on another node: ask there)."""
    found = []
    for server in map(_read, sorted(Path(state).expanduser().glob("*.json"))):
        if server.node != platform.node():
            found.append((server, "elsewhere"))
        elif not running(server):
            found.append((server, "gone"))
        else:
            found.append((server, "ready" if _answers(server, None) else "not answering"))
    return found


def running(server: Server) -> list[psutil.Process]:
    """What runs of the server, its own process first: all of its session; when its own process is gone, and the session's
    number may be another's by now, those that were recorded."""

    def of_session(process: psutil.Process) -> bool:
        with suppress(OSError):
            return os.getsid(process.pid) == server.pid
        return False

    recorded = []
    for pid, started in server.processes:
        with suppress(psutil.Error):
            if abs((process := psutil.Process(pid)).create_time() - started) < 2:
                recorded.append(process)
    found = {process.pid: process for process in recorded}
    if server.pid in found:
        found |= {process.pid: process for process in psutil.process_iter() if of_session(process)}
    return _alive(found.values())


def _alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended. A child of ours that has is collected; an orphan only init can, and in a container none may."""
    alive = []
    for process in processes:
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                process.wait(timeout=0)
            else:
                alive.append(process)
    return alive


def _outlasting(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that have not ended after that time; returns as soon as all have."""
    deadline = time.monotonic() + seconds
    while (left := _alive(processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _spawn(config: ServerConfig, started: list[Server]) -> None:
    """Starts the process, adds it to those that a failure stops, and records it."""
    model, key = check_model(config.model), read_api_key(config)
    folder = Path(config.state).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ValueError(
            f"state={config.state}: no folder can be made there: {error.strerror}"
        ) from None
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two commands at once must not both find the port free
        port = config.port or _free_port(config.host, 0)
        record = _record(platform.node(), port, str(folder))
        if record.exists() and running(there := _read(record)):
            raise ValueError(
                f"port {port}: a server of ours runs there already (pid {there.pid}, {there.model}): stop it with "
                "`verippo serve stop`, or take another --port"
            )
        _free_port(config.host, port)
        command, log, secret = (
            launch_command(config, model, port),
            record.with_suffix(".log"),
            record.with_suffix(".yaml"),
        )
        if key:  # as sglang's own configuration file, for us alone: on the command line everybody could read it
            command += ["--config", str(secret)]
            with open(secret, "w", opener=_private) as file:
                file.write(f"api-key: {json.dumps(key)}\n")
        with open(
            log, "wb", opener=lambda path, flags: _private(path, flags | os.O_APPEND)
        ) as output:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=launch_environment(config),
                )
            except OSError as error:
                secret.unlink(missing_ok=True)
                raise ValueError(f"python={command[0]}: cannot be run: {error.strerror}") from None
        server = Server(
            node=platform.node(),
            host=config.host,
            port=port,
            model=model,
            log=str(log),
            command=command,
            processes=[(process.pid, psutil.Process(process.pid).create_time())],
        )
        started.append(server)  # before its record: who reads that may end us at once
        _write(record, server)


def _wait(server: Server, config: ServerConfig) -> Server:
    """Returns the server once it answers, with its children in the record."""
    key, record = read_api_key(config), _record(server.node, server.port, config.state)
    deadline = time.monotonic() + config.start_timeout_seconds
    try:
        while not _answers(server, key):
            if server.pid not in [process.pid for process in running(server)]:
                raise ValueError(
                    f"the server on port {server.port} exited while starting: {_last_lines(server, key)}"
                )
            if time.monotonic() > deadline:
                limit = f"start_timeout_seconds={config.start_timeout_seconds:g}"
                raise ValueError(
                    f"the server on port {server.port} did not answer in {limit}: {_last_lines(server, key)}"
                )
            time.sleep(0.5)
    finally:
        record.with_suffix(".yaml").unlink(missing_ok=True)
        _blank_out(server, key)
    ready = replace(
        server, processes=[(process.pid, process.create_time()) for process in running(server)]
    )
    _write(record, ready)
    return ready


def _answers(server: Server, key: str | None) -> bool:
    host = "127.0.0.1" if server.host == "0.0.0.0" else server.host
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for path in ("model_info", "get_model_info"):  # the second in older versions
        try:
            DIRECT.open(
                urllib.request.Request(f"http://{host}:{server.port}/{path}", headers=headers),
                timeout=5,
            ).close()
            return True
        except urllib.error.HTTPError as error:
            if error.code != 404:
                return error.code in (401, 403)  # it has a key that we do not know
        except OSError:
            return False
    return False


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _blank_out(server: Server, key: str | None) -> None:
    """sglang prints its settings, the key among them, as it starts: stars take its place in the log."""
    with open(server.log, "r+b") as log:
        text, at = log.read(), -1
        while key and (at := text.find(key.encode(), at + 1)) >= 0:
            log.seek(at)
            log.write(b"*" * len(key.encode()))


def _last_lines(server: Server, key: str | None) -> str:
    text = (
        Path(server.log).read_text(encoding="utf-8", errors="replace").replace(key or "\0", "***")
    )
    lines = [line.strip() for line in text[-20_000:].splitlines() if line.strip()]
    hint = (
        "; give --python, the interpreter of an environment that has it"
        if "No module named 'sglang'" in text
        else ""
    )
    return (
        f"{' | '.join(lines[-4:])[-700:] or 'nothing was printed'} (all of it: {server.log}){hint}"
    )


def _free_port(host: str, port: int) -> int:
    """The port, or any free one for 0. Raises ValueError when something listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"host={host} port={port}: cannot listen there ({error.strerror}): take another --port"
            ) from None
        return probe.getsockname()[1]


def _record(node: str, port: int, state: str) -> Path:
    return Path(state).expanduser() / f"{node}-{port}.json"


def _read(path: Path) -> Server:
    try:
        fields = json.loads(path.read_text())
        return Server(
            **fields
            | {"processes": [(int(pid), float(started)) for pid, started in fields["processes"]]}
        )
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path}: not a server's record: remove it") from None


def _write(path: Path, server: Server) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(server), indent=1))
    temporary.replace(path)
