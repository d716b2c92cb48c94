"""Commands in README.md and BENCHMARKS.md name stages and options that exist."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import get_type_hints

import pytest

from verippo.launch import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "BENCHMARKS.md")


def options(config, prefix=""):
    """Every option of a configuration class, nested ones with a dot."""
    for name, kind in get_type_hints(config).items():
        yield f"--{prefix}{name}"
        if dataclasses.is_dataclass(kind):
            yield from options(kind, f"{prefix}{name}.")


def commands(text):
    """(stage, its options as they stand) of each command line, whose lines a backslash or the end of a code span joins."""
    text, stages = re.sub(r"\\\n\s*", " ", text), "|".join(sorted(cli.COMMANDS, reverse=True))
    for span in [*re.findall(r"^    (.*)$", text, re.MULTILINE), *re.findall(r"`([^`]*)`", text)]:
        if found := re.search(
            rf"(?:\bverippo|verippo\.launch\.cli|\.\.\.)\s+({stages})\b(.*)", span, re.DOTALL
        ):
            yield found[1], re.findall(r"(?<=\s)--[\w.]+", found[2].split(" #")[0])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_the_documents_name_options_that_exist(document):
    found = list(commands((ROOT / document).read_text()))
    assert len(found) > 5
    for stage, given in found:
        known = {
            "--config",
            "--help",
            "--print_config",
            *options(cli._named(cli.COMMANDS[stage].config)),
        }
        assert set(given) <= known, stage
