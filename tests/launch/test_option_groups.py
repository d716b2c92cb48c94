"""The help of every command: examples that parse, and each option under a heading."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from verippo.launch.cli import name_positional, parse
from verippo.launch.commands import COMMANDS, import_name
from verippo.launch.help import command_help
from verippo.launch.option_groups import HEADINGS, grouped_options, options

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_heading(name):
    config_class = import_name(COMMANDS[name].config)
    grouped = grouped_options(name, config_class).values()
    listed = sorted(option for group in grouped for option in group)
    assert listed == sorted(options(config_class))


def test_every_name_in_the_groups_is_an_option():
    known = set()
    for name, command in COMMANDS.items():
        for option in options(import_name(command.config)):
            first = option.name.removeprefix("--").partition(".")[0]
            known |= {first, f"{name.replace(' ', '_')}/{first}"}
    assert set(HEADINGS) <= known


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = COMMANDS[name]
    examples = command.examples.replace("\\\n", " ").strip().splitlines()
    assert len(examples) == 3 if name == "ppo" else len(examples) in (1, 2)
    for example in examples:
        found = re.fullmatch(
            rf"(?:verippo|deepspeed .* verippo\.launch\.cli) {name}( .*|)", example
        )
        assert found, example
        arguments = name_positional(command, shlex.split(found[1]))
        parse(import_name(command.config), arguments, program=name)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_starts_with_examples_and_fits_100_columns(name):
    text = command_help(name)
    assert text.startswith("examples:\n  ")
    assert max(map(len, text.splitlines())) <= 100


def test_headings_come_in_order_and_defaults_are_shown():
    text = command_help("ppo")
    headings = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert headings == ["examples", "model", "data", "optimisation", "sampling", "verifier", "run"]
    options = text.partition("\nmodel:\n")[2]
    entries = re.split(r"\n  (?=--)", options)
    for entry in entries:
        assert re.search(r"\(.*; (default: .+|required)\)", " ".join(entry.split())), entry
    assert "(float; default: 0.03)" in text
