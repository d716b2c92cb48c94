"""Configuration of an sglang server, and the command and environment that start it."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..bounds import CountingInt, PortInt, PositiveFloat, check_bounds

STATE = "~/.cache/verippo/servers"
"""Default folder of the records of servers."""

CPU_ARGUMENTS = (
    "--device cpu --attention-backend torch_native --sampling-backend pytorch --dtype float32 "
    "--skip-server-warmup --disable-overlap-schedule --max-total-tokens 16384 "
    "--mem-fraction-static 0.1 --sleep-on-idle"
)
"""Arguments for a CPU. Without AMX only sglang's torch-native backend runs; without
--sleep-on-idle an idle scheduler would keep a core busy."""
CPU_VARIABLES = {"SGLANG_USE_CPU_ENGINE": "1"}
"""Environment variables for a CPU."""

LAUNCHER_VARIABLES = ("TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_")
"""Prefixes of the variables that torchrun and deepspeed set. A server that inherited them would
take itself for one of their ranks."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Configuration of an sglang server."""

    model: str = ""
    """Folder with the weights, or a hub id."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other nodes reach it, and should go with a key."""
    port: PortInt = 30000
    """Port to listen on; 0 takes a free one."""
    tp: CountingInt = 1
    """Number of GPUs that share one copy of the weights."""
    dp: CountingInt = 1
    """Number of copies of the weights behind the port."""
    mem_fraction: float | None = None
    """Share of a GPU's memory for weights and key-value cache; by default sglang decides."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto uses CUDA where torch sees a GPU; cpu runs sglang on any x86 CPU, slowly, with the
    environment that `make test-sglang` installs (--python .sglang/bin/python)."""
    python: str | None = None
    """Python interpreter of the environment that has sglang; default: this one."""
    api_key_env: str | None = None
    """Environment variable with the API key that requests must carry; default: none."""
    api_key_file: str | None = None
    """File with that API key, used instead of the environment variable."""
    arguments: str = ""
    """Further arguments of sglang.launch_server, as in a shell: --arguments="--log-level warning".
    """
    environment: dict[str, str] = field(default_factory=dict)
    """Variables added to the server's environment."""
    state: str = STATE
    """Folder of the servers' records and logs."""
    start_timeout_seconds: PositiveFloat = 1800.0
    """Seconds to wait for the server to load the weights and answer."""
    stop_timeout_seconds: PositiveFloat = 60.0
    """Seconds to let running requests finish before the processes are killed."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.mem_fraction is not None and not 0 < self.mem_fraction < 1:
            raise ValueError(f"mem_fraction={self.mem_fraction}: must be between 0 and 1")
        if self.api_key_env and self.api_key_file:
            raise ValueError("api_key_env and api_key_file: give one of them")
        try:
            shlex.split(self.arguments)
        except ValueError as error:
            raise ValueError(f"arguments={self.arguments!r}: {error}") from None


def launch_command(config: ServerConfig, model: str, port: int) -> list[str]:
    """Command that starts a server.

    Args:
        config: configuration of the server.
        model: folder or hub id, from `check_model`.
        port: port to listen on.

    Returns:
        The program and its arguments; `config.arguments` come last, and so take precedence.
    """
    options = ["--model-path", model, "--host", config.host, "--port", str(port)]
    options += shlex.split(CPU_ARGUMENTS) if _on_cpu(config) else []
    if config.tp * config.dp > 1:
        options += ["--tp-size", str(config.tp), "--dp-size", str(config.dp)]
    if config.mem_fraction is not None:
        options += ["--mem-fraction-static", str(config.mem_fraction)]
    return [
        config.python or sys.executable,
        "-m",
        "sglang.launch_server",
        *options,
        *shlex.split(config.arguments),
    ]


def _on_cpu(config: ServerConfig) -> bool:
    if config.device != "auto":
        return config.device == "cpu"
    import torch

    return not torch.cuda.is_available()


def launch_environment(config: ServerConfig) -> dict[str, str]:
    """Environment of a server: this process's, without launcher variables and the API key."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(LAUNCHER_VARIABLES) and name != config.api_key_env
    }
    own = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    own |= CPU_VARIABLES if _on_cpu(config) else {}
    return inherited | own | config.environment


def check_model(model: str) -> str:
    """Checks that a model can be served.

    Args:
        model: folder with the weights, or a hub id.

    Returns:
        Absolute path of the folder, or the hub id.

    Raises:
        ValueError: there is no model in the folder.
    """
    path = Path(model).expanduser()
    if (path / "config.json").exists():
        return str(path.resolve())
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ValueError(
            f"model={model!r}: no model there (config.json is missing); give a folder or a hub id"
        )
    return model


def read_api_key(config: ServerConfig) -> str | None:
    """Reads the API key of a server.

    Returns:
        The key, or None if the configuration has none.

    Raises:
        ValueError: the key cannot be read, or is empty.
    """
    if config.api_key_file:
        source = f"api_key_file={config.api_key_file}"
        try:
            key = Path(config.api_key_file).expanduser().read_text().strip()
        except OSError as error:
            raise ValueError(f"{source}: cannot be read: {error.strerror}") from None
    elif config.api_key_env:
        source = f"api_key_env={config.api_key_env}"
        key = os.environ.get(config.api_key_env, "").strip()
    else:
        return None
    if not key:
        raise ValueError(f"{source}: the key is empty or not set")
    return key
