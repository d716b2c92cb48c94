"""Checks of options before they are parsed: names, configuration files, texts."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.files import read_yaml
from .option_groups import options

SPECIAL = ("--config", "--print_config", "--help")
MAX_SUGGESTIONS = 3


def values_of(arguments: Sequence[str], name: str) -> Iterator[str]:
    """The values of an option, in order; "" where it has none."""
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=False):
        if argument == name:
            yield "" if following.startswith("--") else following
        elif argument.startswith(f"{name}="):
            yield argument.partition("=")[2]


def read_config_files(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The contents of the YAML files that `--config` names.

    Raises:
        ValueError: a file cannot be read, or holds no mapping; the message names it.
    """
    paths = [Path(value).expanduser() for value in values_of(arguments, "--config")]
    return [read_yaml(path, name="config") for path in paths]


def check_names(
    command: str,
    config_class: type,
    arguments: Sequence[str],
    files: Sequence[Mapping[str, Any]],
) -> None:
    """Refuses unknown options, with names that may be meant.

    Args:
        command: name of the command.
        config_class: dataclass of its configuration.
        arguments: its arguments.
        files: contents of its configuration files.

    Raises:
        ValueError: an option is unknown.
    """
    known = [option.name for option in options(config_class)]
    given = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    given += [f"--{name}" for file in files for name in _dotted(file, known)]
    for name in given:
        if name == "--" or name in SPECIAL or _is_known(name, known):
            continue
        own = name.removeprefix("--")
        longer = [other for other in known if other.endswith((f"_{own}", f".{own}"))]
        close = difflib.get_close_matches(name, known, n=MAX_SUGGESTIONS, cutoff=0.7)
        if longer:
            hint = f"{command} has {' and '.join(longer[:MAX_SUGGESTIONS])}"
        elif close:
            hint = f"did you mean {' or '.join(close)}?"
        else:
            hint = f"see verippo {command} --help"
        raise ValueError(f"unknown option {name}: {hint}")


def _is_known(name: str, known: list[str]) -> bool:
    """Whether a name is an option, a group of options, or an entry of an option's mapping."""
    whole = name.removesuffix("+")
    return whole in known or any(
        other.startswith(f"{whole}.") or whole.startswith(f"{other}.") for other in known
    )


def _dotted(settings: Mapping[str, Any], known: list[str], prefix: str = "") -> Iterator[str]:
    """Dotted names of nested settings, down to the options."""
    for name, value in settings.items():
        whole = f"{prefix}{name}"
        if isinstance(value, dict) and f"--{whole}" not in known:
            yield from _dotted(value, known, f"{whole}.")
        else:
            yield whole


def check_texts(values: Any, name: str = "") -> None:
    """Refuses texts that no path or name can hold, and an output folder without a name.

    Raises:
        ValueError: a text holds a null character, or `output` is blank.
    """
    if isinstance(values, str):
        if "\0" in values:
            raise ValueError(f"{name} holds a null character: {values!r}")
        if name == "output" and not values.strip():
            raise ValueError("output is empty: give a folder")
    elif isinstance(values, dict):
        for key, value in values.items():
            check_texts(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, (list, tuple)):
        for value in values:
            check_texts(value, name)
