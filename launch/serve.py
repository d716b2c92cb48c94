"""Commands `verippo serve start`, `status` and `stop`: sglang servers on this machine."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

from ..core.bounds import CountingInt, NonNegativeFloat, check_bounds
from ..core.sampling.server import Server, has_exited, servers, start_all
from ..core.sampling.server import stop as stop_server
from ..core.sampling.server_command import STATE, ServerConfig


@dataclass(frozen=True, kw_only=True)
class ServeConfig(ServerConfig):
    """Starts sglang servers and prints the --sampler.urls option for `verippo ppo`."""

    num: CountingInt = 1
    """Number of servers, on the ports `port`, `port` + 1, ..."""
    gpus: str = ""
    """Numbers of the GPUs to use, such as 4,5,6,7: tp x dp for each server; default: all visible.
    """
    foreground: bool = False
    """Run until interrupted, then stop the servers: for Slurm, containers and systemd."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ValueError("give --model: a folder with the weights, or a hub id")

    def each(self) -> list[ServerConfig]:
        """Configuration of each server.

        Raises:
            ValueError: there are too few GPUs.
        """
        if self.num == 1 and not self.gpus:
            return [self]
        share = self.tp * self.dp
        needed = self.num * share
        gpus = (
            self.gpus or os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(needed)))
        ).split(",")
        if self.device != "cpu" and len(gpus) < needed:
            raise ValueError(
                f"gpus={','.join(gpus)}: {self.num} servers with tp={self.tp}, dp={self.dp} need "
                f"{needed} GPUs"
            )
        return [
            replace(
                self,
                port=self.port and self.port + i,
                environment={"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * share : (i + 1) * share])}
                | self.environment,
            )
            for i in range(self.num)
        ]


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Lists the servers that `verippo serve start` started: a line for each, with its address,
    whether it answers, its process, model and log."""

    port: int | None = None
    """Port of one server; default: all servers."""
    state: str = STATE
    """Folder of the servers' records and logs, as given to start."""

    def __post_init__(self) -> None:
        check_bounds(self)

    def chosen(self) -> list[tuple[Server, str]]:
        """Selected servers with their states.

        Raises:
            ValueError: there is none on `port`.
        """
        known = servers(self.state)
        found = [(server, state) for server, state in known if self.port in (None, server.port)]
        if self.port is not None and not found:
            ports = ", ".join(str(server.port) for server, _ in known) or "none"
            raise ValueError(
                f"port={self.port}: there is no server of verippo; ports in use: {ports} "
                f"({self.state})"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class StopConfig(StatusConfig):
    """Stops the servers that `verippo serve start` started on this machine, once their running
    requests are done."""

    stop_timeout_seconds: NonNegativeFloat = 60.0
    """Seconds to let running requests finish before the processes are killed."""


def start(config: ServeConfig, *, resolved: dict[str, Any]) -> None:
    """Runs the command `serve start`."""
    if config.host == "0.0.0.0" and not (config.api_key_env or config.api_key_file):
        print(
            "warning: anyone who can reach this machine can replace the model's weights: give "
            "--api_key_file",
            file=sys.stderr,
        )
    print(f"starting {config.num} of {config.model}; logs are in {config.state}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0 if config.foreground else 1))
    started = start_all(config.each())
    try:
        for server in started:
            print(_line(server, "ready"))
        print(f"--sampler.urls {','.join(server.url for server in started)}", flush=True)
        while config.foreground:  # until a signal, or until a server exits
            for server in started:
                if has_exited(server):
                    sys.exit(f"verippo: {server.url} exited unexpectedly: {server.log}")
            time.sleep(1)
    finally:
        if config.foreground:
            for server in started:
                stop_server(server, timeout_seconds=config.stop_timeout_seconds)


def status(config: StatusConfig, *, resolved: dict[str, Any]) -> None:
    """Runs the command `serve status`, which prints a line for each server."""
    for server, state in config.chosen():
        print(_line(server, state))


def stop(config: StopConfig, *, resolved: dict[str, Any]) -> None:
    """Runs the command `serve stop`; servers on other nodes are not stopped."""
    for server, state in config.chosen():
        if state == "elsewhere":
            outcome = f"runs on {server.node}: stop it there"
        elif stop_server(server, timeout_seconds=config.stop_timeout_seconds):
            outcome = "stopped"
        else:
            outcome = f"had exited unexpectedly: {server.log}"
        print(f"{server.url}  {outcome}", flush=True)


def _line(server: Server, state: str) -> str:
    return f"{server.url}  {state}  pid {server.pid}  {server.model}  {server.log}"
