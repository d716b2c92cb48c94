"""`verippo serve start`, `status` and `stop`: sglang servers on this machine."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

from ..core.bounds import CountingInt
from ..core.sampling.server import Server, running, servers, start_all
from ..core.sampling.server import stop as stop_server
from ..core.sampling.server_command import STATE, ServerConfig


@dataclass(frozen=True, kw_only=True)
class ServeConfig(ServerConfig):
    """Starts sglang servers; prints the --sampler.urls option for `verippo ppo` once they answer."""

    num: CountingInt = 1
    """Number of servers, on the ports `port`, `port` + 1, ..."""
    gpus: str = ""
    """Numbers of the GPUs to use, such as 4,5,6,7: tp x dp for each server; default: all visible.
    """
    foreground: bool = False
    """Stay until interrupted, then stop the servers: for Slurm, containers and systemd."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ValueError("give --model: a folder with the weights, or a hub id")

    def each(self) -> list[ServerConfig]:
        """One configuration for each server.

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
                f"gpus={','.join(gpus)}: {self.num} servers of tp={self.tp}, dp={self.dp} need {needed} of them"
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
class ServedConfig:
    """Lists or stops the servers that `verippo serve start` started."""

    port: int | None = None
    """Port of the one server meant; default: all."""
    state: str = STATE
    """Folder of the servers' records and logs, as given to start."""
    stop_timeout_seconds: float = 60.0
    """Seconds to let running requests finish before the processes are killed."""

    def chosen(self) -> list[tuple[Server, str]]:
        """The servers with their states.

        Raises:
            ValueError: there is none on `port`.
        """
        known = servers(self.state)
        found = [(server, state) for server, state in known if self.port in (None, server.port)]
        if self.port is not None and not found:
            ports = ", ".join(str(server.port) for server, _ in known)
            raise ValueError(
                f"port={self.port}: no server of ours there; they are on {ports or 'no port at all'} ({self.state})"
            )
        return found


def start(config: ServeConfig, *, resolved: dict[str, Any]) -> None:
    """The command `serve start`."""
    if config.host == "0.0.0.0" and not (config.api_key_env or config.api_key_file):
        print(
            "warning: whoever reaches this machine can replace the model's weights: give --api_key_file",
            file=sys.stderr,
        )
    print(f"starting {config.num} of {config.model}; logs are in {config.state}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0 if config.foreground else 1))
    started = start_all(config.each())
    try:
        for server in started:
            print(f"{server.url}  ready  pid {server.pid}  {server.model}  {server.log}")
        print(f"--sampler.urls {','.join(server.url for server in started)}", flush=True)
        while config.foreground:  # until a signal, or until a server ends by itself
            for server in started:
                if server.pid not in [process.pid for process in running(server)]:
                    sys.exit(f"verippo: {server.url} ended by itself: {server.log}")
            time.sleep(1)
    finally:
        if config.foreground:
            for server in started:
                stop_server(server, state=config.state, timeout_seconds=config.stop_timeout_seconds)


def status(config: ServedConfig, *, resolved: dict[str, Any]) -> None:
    """The command `serve status`: a line for each server."""
    for server, state in config.chosen():
        print(f"{server.url}  {state}  pid {server.pid}  {server.model}  {server.log}")


def stop(config: ServedConfig, *, resolved: dict[str, Any]) -> None:
    """The command `serve stop`; servers of other nodes are left alone."""
    for server, state in config.chosen():
        if state == "elsewhere":
            print(f"{server.url}  runs on {server.node}: stop it there")
        else:
            ran = stop_server(
                server, state=config.state, timeout_seconds=config.stop_timeout_seconds
            )
            outcome = "stopped" if ran else f"had ended by itself: {server.log}"
            print(f"{server.url}  {outcome}", flush=True)
