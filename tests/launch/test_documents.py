"""Commands in README.md, BENCHMARKS.md and docs/cluster.md use commands and options that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from verippo.launch import plan_page
from verippo.launch.commands import COMMANDS, import_name
from verippo.launch.option_groups import options

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "BENCHMARKS.md", "docs/cluster.md")


def commands(text):
    """Yields the command and its options for each command line in code blocks and code spans."""
    text = re.sub(r"\\\n\s*", " ", text)
    stages = "|".join(sorted(COMMANDS, reverse=True))
    pattern = rf"(?:\bverippo|verippo\.launch\.cli|\.\.\.)\s+({stages})\b(.*)"
    for span in [*re.findall(r"^    (.*)$", text, re.MULTILINE), *re.findall(r"`([^`]*)`", text)]:
        if found := re.search(pattern, span, re.DOTALL):
            yield found[1], re.findall(r"(?<=\s)--[\w.]+", found[2].split(" #")[0])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_documents_use_existing_options(document):
    found = list(commands((ROOT / document).read_text()))
    assert len(found) > 5
    for stage, given in found:
        config_class = import_name(COMMANDS[stage].config)
        known = {option.name for option in options(config_class)}
        assert set(given) <= known | {"--config", "--help", "--print_config"}, stage


def test_files_named_on_the_cluster_page_exist():
    text = (ROOT / "docs" / "cluster.md").read_text()
    named = set(re.findall(r"launch/(?:configs|slurm)/[\w.]+\w", text))
    assert len(named) > 8
    assert not [name for name in named if not (ROOT / name).exists()]


def test_tables_of_the_cluster_page_are_what_its_command_writes():
    assert plan_page.main(["--check"]) == 0
