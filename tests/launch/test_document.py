from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from verippo.launch import document, families, option_groups


@dataclass
class Inner:
    depth: int = 3
    """Levels."""


@dataclass
class Base:
    name: str
    """Who it is."""
    kind: Literal["a", "b"] = "a"
    """Which."""


@dataclass
class Settings(Base):
    kind: Literal["a", "b"] = "b"
    """Which one."""
    inner: Inner = field(default_factory=Inner)
    flag: bool = False
    """Whether."""
    size: int | None = None
    """How
    large."""


def test_options_have_type_default_and_the_text_under_the_field():
    assert list(option_groups.options(Settings)) == [
        ("--name", "str", "required", "Who it is."),
        ("--kind", "a, b", "b", "Which one."),
        ("--inner.depth", "int", "3", "Levels."),
        ("--flag", "bool", "false", "Whether."),
        ("--size", "int or null", "null", "How large."),
    ]


def test_the_page_of_options_is_up_to_date():
    assert document.FILE.read_text(encoding="utf-8") == document.document(), (
        "run `python -m verippo.launch.document`"
    )


def test_every_option_has_a_meaning():
    for line in document.document().splitlines():
        if line.startswith("| `--"):
            assert line.split(" | ")[-1].strip(" |"), line


def test_page_of_model_families_is_what_its_command_writes():
    assert families.main(["--check"]) == 0
