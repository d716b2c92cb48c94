"""The text of `verippo --help` and of `verippo COMMAND --help`."""

from __future__ import annotations

import inspect
import textwrap

from .commands import COMMANDS, Command, import_name
from .option_groups import Option, grouped_options, options

NAME_WIDTH = 32
USAGE = """\
usage: verippo COMMAND [--config FILE.yaml] [--OPTION VALUE ...]

commands:
{commands}

`verippo COMMAND --help` lists a command's options.
VERIPPO_TRACEBACK=1 shows where an error comes from."""
COMMAND_HELP = """\
examples:
{examples}

usage: verippo {name} [--config FILE.yaml] [--OPTION VALUE ...]

{description}

{options}

A YAML file may hold any of these options; --print_config prints them all as YAML."""


def usage(group: str = "") -> str:
    """Lists the commands, or those whose first word is `group`; empty if there are none."""
    start = f"{group} " if group else ""
    chosen = {name: each for name, each in COMMANDS.items() if name.startswith(start)}
    lines = [f"  {name:<14}{command.summary}" for name, command in chosen.items()]
    return USAGE.format(commands="\n".join(lines)) if lines else ""


def command_help(name: str) -> str:
    """Examples, description and options of a command."""
    command = COMMANDS[name]
    config_class = import_name(command.config)
    own = {option.name for option in own_options(command)}
    groups = [
        "\n".join([f"{heading}:", *(option_text(option) for option in listed)])
        for heading, group in grouped_options(name, config_class).items()
        if (listed := [option for option in group if option.name in own])
    ]
    return COMMAND_HELP.format(
        examples=textwrap.indent(command.examples.strip(), "  "),
        name=name,
        description=inspect.getdoc(config_class),
        options="\n\n".join(groups),
    )


def own_options(command: Command) -> list[Option]:
    """A command's options without those of the command that it extends."""
    config_class = import_name(command.config)
    inherited = set()
    if command.extends:
        base = import_name(COMMANDS[command.extends].config)
        inherited = {option.name for option in options(base)}
    return [option for option in options(config_class) if option.name not in inherited]


def option_text(option: Option) -> str:
    """An option with its type, meaning and default, wrapped to 100 columns."""
    kind = option.type.removesuffix(" or null")
    default = f"default: {option.default or 'empty'}".replace("default: required", "required")
    return textwrap.fill(
        f"{option.meaning} ({kind}; {default})",
        width=100,
        initial_indent=f"  {option.name:<{NAME_WIDTH}}",
        subsequent_indent=" " * (NAME_WIDTH + 2),
        break_on_hyphens=False,
    )
