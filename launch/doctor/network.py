"""Checks of ports and servers."""

from __future__ import annotations

import json
import os
import socket
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
from packaging.version import InvalidVersion, Version

from ...core.llm.config import LLMConfig
from ...core.sampling.sglang_client import SglangServer
from ...core.sampling.sglang_sampler import connect
from ...core.training.pretrained import load_config
from ...core.training.run_config import RunConfig
from ...rl.config import PPOConfig
from ...sft.config import VerifierTrainingConfig
from .findings import Caution, Report

DEFAULT_PORT = 29500
"""Port of deepspeed's and torchrun's rank 0 where none is given."""
OLDEST_SERVER = "0.5.5"
SIZES = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
"""Numbers of a configuration in which the policy and the servers' model must agree."""


def launched_port() -> tuple[str | None, bool]:
    """MASTER_PORT as the user gave it, and whether a launcher started several ranks."""
    several = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    return os.environ.get("MASTER_PORT"), several


def check_network(
    report: Report,
    config: RunConfig,
    *,
    connect_seconds: float,
    port: str | None,
    launched: bool,
) -> None:
    """Checks ports of this host, and the servers that the run asks.

    Args:
        report: receives the findings.
        config: the run's configuration.
        connect_seconds: time limit of a connection.
        port: MASTER_PORT before the ranks met; None where it is not set.
        launched: whether the ranks have met at that port.
    """
    report.group = "network"
    report.check("MASTER_PORT", partial(_master_port, port, launched=launched))
    if isinstance(config, PPOConfig) and config.sampler.kind == "sglang":
        if config.sampler.sync == "distributed" and config.sampler.master_port:
            report.check("sampler.master_port", partial(_sampler_port, config.sampler.master_port))
        try:
            servers = connect(config.sampler)
        except ValueError as error:
            report.add("FAILED", "sampler.urls", str(error))
            servers = []
        for server in servers:
            find = partial(_server, server, config, connect_seconds)
            report.check(f"server {server.url}", find)
    if judge := _judge(config):
        report.check("llm", partial(_llm, judge, connect_seconds))


def _judge(config: RunConfig) -> LLMConfig | None:
    """The LLM that a run asks, if it asks one."""
    if isinstance(config, PPOConfig):
        return config.llm if config.verifier.kind == "judge" else None
    if isinstance(config, VerifierTrainingConfig) and config.llm.model:
        return config.llm
    return None


def _in_use(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return True
    return False


def _master_port(value: str | None, *, launched: bool) -> str:
    if value is not None and not (value.isdigit() and 1024 <= int(value) <= 65535):
        raise ValueError(f"{value!r}: must be a number from 1024 to 65535: set another one")
    port = int(value or DEFAULT_PORT)
    if launched:
        return f"{port}, at which the ranks have met"
    if not _in_use(port):
        return f"{port} is free on this host"
    if value is None:
        raise Caution(
            f"{port}, the launchers' default, is in use on this host: give --master_port to "
            "deepspeed, or --master-port to torchrun"
        )
    raise ValueError(f"{port} is in use on this host: set another one, or end what uses it")


def _sampler_port(port: int) -> str:
    if _in_use(port):
        raise ValueError(f"{port} is in use on this host: give another one, or 0 for a free one")
    return f"{port} is free"


def check_reachable(url: str, seconds: float) -> None:
    """Checks that a server accepts connections.

    Raises:
        ValueError: it does not, within `seconds`.
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=seconds).close()
    except OSError as error:
        raise ValueError(
            f"cannot be reached within {seconds:g} s ({error.strerror or error}): start it "
            "(`verippo serve start`), or correct its address"
        ) from None


def _server(server: SglangServer, config: PPOConfig, seconds: float) -> str:
    check_reachable(server.url, seconds)
    info = server.info()
    version = str(info.get("version", "unknown"))
    if _is_older(version, OLDEST_SERVER):
        raise ValueError(f"sglang {version}: needs {OLDEST_SERVER} or newer: update it")
    if config.sampler.sync != "disk" and int(info.get("dp_size") or 1) > 1:
        raise ValueError(
            f"dp_size={info['dp_size']}: sampler.sync={config.sampler.sync} cannot update it: give "
            "disk, or start servers with dp 1"
        )
    if config.sampler.sleep and info.get("enable_memory_saver") is False:
        raise ValueError("sampler.sleep needs a server started with --enable-memory-saver")
    longest = config.max_prompt_tokens + config.sampling.max_new_tokens
    context = info.get("context_length")
    if context and longest > context:
        raise ValueError(
            f"its context of {context} tokens is under max_prompt_tokens + "
            f"sampling.max_new_tokens = {longest}: start it with --context-length {longest}"
        )
    model = str(info.get("model_path"))
    _check_served(model, config.policy)
    return f"sglang {version}, model {model}"


def _is_older(version: str, oldest: str) -> bool:
    try:
        return Version(version) < Version(oldest)
    except InvalidVersion:  # a build without a number
        return False


def _check_served(model: str, policy: str) -> None:
    """Checks that the policy's weights fit into the model that a server has loaded."""
    if model == policy:
        return
    if not Path(model).is_dir():
        raise Caution(
            f"serves {model}, which is not on this host to compare with the policy {policy}"
        )
    served = load_config(model)
    own = load_config(policy)
    for name in SIZES:
        theirs = getattr(served, name, None)
        ours = getattr(own, name, None)
        if theirs != ours:
            raise ValueError(
                f"serves {model} with {name}={theirs}, but the policy {policy} has {ours}: start "
                "the server with --model of the policy"
            )


def _llm(config: LLMConfig, seconds: float) -> str:
    client = openai.OpenAI(
        base_url=config.base_url,
        api_key=config.api_key() or "none",
        max_retries=0,
        timeout=seconds,
    )
    url = client.base_url
    try:
        names = [model.id for model in client.models.list()]
    except openai.APIConnectionError as error:
        raise ValueError(
            f"{url} cannot be reached within {seconds:g} s ({error.__cause__ or error}): start it, "
            "or correct llm.base_url"
        ) from None
    except openai.AuthenticationError:
        raise ValueError(f"{url} refuses the API key in {config.api_key_env}") from None
    except (openai.OpenAIError, json.JSONDecodeError) as error:
        raise Caution(f"{url} answers, but does not list its models ({error})") from None
    if names and config.model not in names:
        listed: Any = ", ".join(names[:5])
        raise Caution(f"{url} lists {listed}, and not llm.model={config.model}")
    return f"{url} has the model {config.model}"
