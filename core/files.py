"""Files that users name: reading them safely, and telling their paths from hub ids."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

MAX_YAML_VALUES = 10_000
"""Values in a YAML file with its aliases expanded; a bomb of aliases has billions."""


def check_regular(path: Path, *, name: str) -> None:
    """Refuses anything but a regular file: a FIFO would block, and a device might never end.

    Args:
        path: the file.
        name: what the user knows it as, such as "data"; begins the error.

    Raises:
        ValueError: it is missing, or is no regular file.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"{name} {path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise ValueError(f"{name} {path}: is {kind}: give a regular file")


def read_file(path: Path, *, name: str) -> bytes:
    """Reads a regular file; errors begin with `name` and the path.

    Raises:
        ValueError: it is missing, no regular file, or unreadable.
    """
    check_regular(path, name=name)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{name} {path}: {error.strerror}") from None


def parse_json(data: bytes, *, where: str) -> Any:
    """Parses JSON in UTF-8; errors begin with `where`.

    Raises:
        ValueError: it is not valid JSON, is nested too deeply, or holds an endless number.
    """
    try:
        return json.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{where} is not valid JSON: it is nested too deeply") from None


def read_yaml(path: Path, *, name: str) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping with text as keys.

    Raises:
        ValueError: the file cannot be read, is not UTF-8 or not YAML, holds something else, or
            expands to more than MAX_YAML_VALUES values.
    """
    data = read_file(path, name=name)
    try:
        text = data.decode("utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise ValueError("holds no mapping of options to values")
        if _num_values(node, {}) > MAX_YAML_VALUES:
            raise ValueError(f"its aliases expand to more than {MAX_YAML_VALUES} values")
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"{name} {path}: is nested too deeply") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{name} {path}: {' '.join(str(error).split())}") from None


def _num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values under a node with its aliases expanded.

    `known` holds the numbers of finished nodes by id, and 0 for those that contain this one.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias contains itself")
        return known[id(node)]
    known[id(node)] = 0
    num = 1
    if isinstance(node, yaml.SequenceNode):
        num += sum(_num_values(part, known) for part in node.value)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise ValueError(f"line {key.start_mark.line + 1}: the key is not text")
            num += _num_values(value, known)
    known[id(node)] = num
    return num


def replace_file(path: Path, text: str) -> Path:
    """Writes a text file in one step, so that a reader never finds it incomplete.

    Args:
        path: Path of the file.
        text: The content; characters that UTF-8 cannot hold are replaced by question marks.

    Returns:
        `path`.
    """
    return replace_bytes(path, text.encode(errors="replace"))


def replace_bytes(path: Path, data: bytes) -> Path:
    """Writes a file in one step, so that a reader never finds it incomplete; returns `path`."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    return temporary.replace(path)


def is_path(name: str) -> bool:
    """Whether a name of a model or data set is a path of this machine, and not a hub id.

    It is one if it starts with a dot, a slash or a tilde, has more than one slash, or begins with a
    folder that exists.
    """
    several = name.count("/") > 1
    return several or name.startswith((".", "/", "~")) or "/" in name and Path(name).parent.is_dir()


@contextmanager
def removing_traces(folder: Path, *, always: bool = False) -> Iterator[None]:
    """When the body raises ValueError, removes what it made in the folder that holds nothing.

    That is: the lock, empty files and empty folders, and the folder itself with the parents that
    did not exist before. Files with content stay.

    Args:
        folder: the folder.
        always: whether to remove it when the body succeeds too.
    """
    existed = [parent for parent in (folder, *folder.parents) if parent.exists()]
    before = set(folder.iterdir()) if folder.is_dir() else set()
    try:
        yield
    except ValueError:
        _remove_traces(folder, existed, before)
        raise
    if always:
        _remove_traces(folder, existed, before)


def _remove_traces(folder: Path, existed: list[Path], before: set[Path]) -> None:
    with suppress(OSError):
        for path in set(folder.iterdir()) - before:
            if path.is_dir():
                with suppress(OSError):
                    path.rmdir()
            elif path.name == ".lock" or not path.stat().st_size:
                path.unlink()
        for made in (folder, *folder.parents):
            if made in existed:
                break
            made.rmdir()


def is_main_process() -> bool:
    """Whether this process is alone, or rank 0 of a distributed run that may not have begun."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
