"""Runs that connect to nothing but the given servers, for data that may not leave."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .option_check import values_of

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "offline",
}
"""Read by the libraries when they are imported, and by the processes that a run starts."""
TRUE = ("1", "on", "true", "yes")


def go_offline_if_asked(arguments: Sequence[str], files: Sequence[Mapping[str, Any]]) -> None:
    """Sets ENVIRONMENT if an option, a configuration file or HF_HUB_OFFLINE asks for it.

    Call it before any library of Hugging Face is imported.

    Args:
        arguments: the command's arguments.
        files: contents of its configuration files, which options override.
    """
    given = [file["offline"] for file in files if "offline" in file]
    given += [value or "true" for value in values_of(arguments, "--offline")]
    asked = bool(given) and str(given[-1]).lower() in TRUE
    if asked or os.environ.get("HF_HUB_OFFLINE", "").lower() in TRUE:
        os.environ.update(ENVIRONMENT)


def check_servers(config: Any) -> None:
    """Refuses a model whose server is not given, when `config.offline` is set.

    Raises:
        ValueError: a client would call OpenAI's own server.
    """
    if not (hasattr(config, "offline") and config.offline):
        return
    for client in _clients(config):
        if client.model and not client.base_url:
            raise ValueError(
                f"offline=true, but no server is given for the model {client.model}: "
                "give its base_url"
            )


def _clients(config: Any) -> Iterator[Any]:
    """The configurations of LLM clients that a command uses."""
    if hasattr(config, "client"):  # of eval, whose options of the client stand beside it
        if config.engine == "openai":
            yield config.client
        return
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for part in value if isinstance(value, list) else [value]:
            if hasattr(part, "base_url") and hasattr(part, "api_key_env"):
                yield part
            elif dataclasses.is_dataclass(part):
                yield from _clients(part)
