"""Writes docs/configuration.md: every option of every command, from the configuration dataclasses.

python -m verippo.launch.document            # writes the file
python -m verippo.launch.document --check    # fails when the file is out of date
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .cli import COMMANDS, Command

FILE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
INTRODUCTION = """# Configuration

<!-- Written by `python -m verippo.launch.document`; do not edit. -->

Every command takes its options on the command line, from a YAML file (`--config FILE.yaml`), or both; the command
line wins. Nested options are spelled with a dot on the command line and as nested mappings in YAML. Unknown
options are refused. `verippo COMMAND --print_config` prints the resolved values as YAML.
"""


class Option(NamedTuple):
    """A row of the table."""

    name: str
    type: str
    default: str
    meaning: str


def options(config_class: type, prefix: str = "") -> Iterator[Option]:
    """Every option of a configuration, nested ones with dotted names."""
    meanings = field_docstrings(config_class)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        name = prefix + field.name
        if dataclasses.is_dataclass(hint):
            yield from options(typing.cast(type, hint), f"{name}.")
        else:
            meaning = meanings.get(field.name, "")
            yield Option(f"--{name}", type_text(hint), default_text(field), meaning)


def field_docstrings(config_class: type) -> dict[str, str]:
    """The text under each field, of the class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for node, text in zip(tree.body, tree.body[1:], strict=False):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[node.target.id] = " ".join(str(text.value.value).split())
    return found


def type_text(hint: Any) -> str:
    """A type as a reader writes its values."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(str(value) for value in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [type_text(part) for part in typing.get_args(hint)]
        return " or ".join("null" if part == "NoneType" else part for part in parts)
    if typing.get_origin(hint) in (list, tuple, dict):
        return str(hint).replace("verippo.core.llm.config.", "")
    return getattr(hint, "__name__", str(hint))


def default_text(field: dataclasses.Field[Any]) -> str:
    """The default, or "required"."""
    if field.default is not dataclasses.MISSING:
        default = "null" if field.default is None else field.default
        return str(default).lower() if isinstance(default, bool) else str(default)
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    return "required"


def section(name: str, command: Command) -> str:
    """A command's heading and table."""
    module, _, class_name = command.config.partition(":")
    config_class = getattr(importlib.import_module(module), class_name)
    lines = [f"\n## verippo {name}\n", inspect.getdoc(config_class) or "", ""]
    lines += ["| option | type | default | meaning |", "|---|---|---|---|"]
    for option in options(config_class):
        cells = [f"`{option.name}`", option.type, option.default or "(empty)", option.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def document() -> str:
    """The whole page."""
    return INTRODUCTION + "".join(section(name, command) for name, command in COMMANDS.items())


if __name__ == "__main__":
    if "--check" not in sys.argv:
        FILE.write_text(document(), encoding="utf-8")
    elif not FILE.exists() or FILE.read_text(encoding="utf-8") != document():
        sys.exit(f"{FILE.name} is out of date: run `python -m verippo.launch.document`")
