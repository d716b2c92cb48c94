"""Commands in the documents can be parsed; those for any machine run."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from verippo.launch import cli, plan_page
from verippo.launch.commands import COMMANDS

ROOT = Path(__file__).parents[2]
STAGES = "|".join([*sorted(COMMANDS, reverse=True), "plan"])
DOCUMENTS = (
    "README.md",
    "BENCHMARKS.md",
    "docs/cluster.md",
    "docs/recipes.md",
)


def commands(document):
    """The folder, command and arguments of each command in a document's code blocks and spans."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / document).read_text())
    folder = ROOT
    pattern = rf"(?:\bverippo|verippo\.launch\.cli|\.\.\.)\s+({STAGES})\b(.*)"
    for line in re.findall(r"^    (.*)$|`([^`]*)`|^(#).*$", text, re.MULTILINE):
        span = line[0] or line[1]
        if line[2]:
            folder = ROOT
        elif span.startswith("cd "):
            folder = ROOT / span[3:]
        elif found := re.search(pattern, span, re.DOTALL):
            words = shlex.split(found[2].split(" #")[0])
            arguments = [word for word in words if word not in ("...", "&")]
            if found[1] != "plan" or "--config" in arguments:  # else only its name
                yield folder, found[1], arguments


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_documents_can_be_parsed(document, monkeypatch, capsys):
    found = list(commands(document))
    for folder, command, arguments in found:
        monkeypatch.chdir(folder)
        with contextlib.suppress(SystemExit):
            cli.main([command, *arguments, "--print_config"])
        said = capsys.readouterr()
        assert not said.err, f"{command} {arguments}: {said.err}"
    assert len(found) > 5


def test_plans_in_documents_run(monkeypatch, capsys):
    plans = [
        (command, arguments)
        for _, command, arguments in commands("docs/cluster.md")
        if command.startswith("plan") and arguments
    ]
    assert len(plans) >= 2
    monkeypatch.chdir(ROOT)
    for command, arguments in plans:
        cli.main([command, *arguments])
        assert "GiB" in capsys.readouterr().out


@pytest.mark.slow
def test_the_first_commands_of_the_recipes_run(tmp_path, monkeypatch):
    """A small demo, then PPO on its files with an advantage function of one's own."""
    ran = 0
    for folder, command, arguments in commands("docs/recipes.md"):
        if not any("runs/tiny" in word for word in arguments):
            continue
        moved = [
            str(tmp_path / word.removeprefix("../")) if "runs/" in word else word
            for word in arguments
        ]
        subprocess.run(
            [sys.executable, "-m", "verippo.launch.cli", command, *moved], cwd=folder, check=True
        )
        ran += 1
    assert ran == 2
    assert (tmp_path / "runs" / "mine" / "report.html").exists()


@pytest.mark.parametrize("document", ["README.md", "docs/cluster.md"])
def test_commands_that_need_gpus_are_marked(document):
    """Each block with a launcher or a server is below a sentence that says so."""
    text = (ROOT / document).read_text()
    first = re.search(r"^    (deepspeed|torchrun|srun|verippo serve) ", text, re.MULTILINE)
    assert first
    assert re.search(r"commands here need\s+GPUs|commands need GPUs", text[: first.start()])


def test_files_named_on_the_cluster_page_exist():
    text = (ROOT / "docs" / "cluster.md").read_text()
    named = set(re.findall(r"launch/(?:configs|slurm)/[\w.]+\w", text))
    assert len(named) > 8
    assert not [name for name in named if not (ROOT / name).exists()]


def test_tables_of_the_cluster_page_are_what_its_command_writes():
    assert plan_page.main(["--check"]) == 0
