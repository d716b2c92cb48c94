"""Writes docs/configuration.md: every option of every command, from the configuration dataclasses.

python -m verippo.launch.document            # writes the file
python -m verippo.launch.document --check    # fails when the file is out of date
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from .commands import COMMANDS, Command, import_name
from .help import own_options

FILE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
INTRODUCTION = """# Configuration

<!-- Written by `python -m verippo.launch.document`; do not edit. -->

Every command takes its options on the command line, from a YAML file (`--config FILE.yaml`), or
both; the command line wins. Nested options are spelled with a dot on the command line and as nested
mappings in YAML. Unknown options are refused. `verippo COMMAND --print_config` prints the resolved
values as YAML.
"""


def section(name: str, command: Command) -> str:
    """A command's heading and table."""
    config_class = import_name(command.config)
    lines = [f"\n## verippo {name}\n", inspect.getdoc(config_class) or "", ""]
    lines += ["| option | type | default | meaning |", "|---|---|---|---|"]
    for option in own_options(command):
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
