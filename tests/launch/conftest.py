"""Running `verippo` in this process, and what it must do with what it cannot use."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from verippo.launch import cli

PROGRESS = re.compile(r"\d+%\||\d+(it|item|answer|step)s?/s|\d+it \[")
SECONDS = 60


def files_in(folder: Path) -> set[str]:
    """Everything under a folder, and the folder itself if it exists."""
    return {str(path) for path in [folder, *folder.rglob("*")] if path.exists()}


@pytest.fixture
def limited() -> Iterator[None]:
    """Ends a test that hangs, such as on a FIFO that nobody writes to."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"the command hung for {SECONDS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def wrong_result(limited: None, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with exit status 2 and one line; returns the line.

    Lines that list malformed items of an evaluation may come before.
    """

    def run(argv: list[object]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(part) for part in argv])
        shown = re.split(r"[\r\n]", capsys.readouterr().err)
        lines = [
            line
            for line in shown
            if line.replace("\x1b[A", "").strip()
            and not PROGRESS.search(line)
            and not line.startswith("malformed: ")
        ]
        assert caught.value.code == 2, lines
        assert len(lines) == 1, lines
        assert lines[0].startswith("verippo: ")
        assert lines[0].isprintable()
        return lines[0]

    return run


@pytest.fixture
def refused(wrong_result: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """As `wrong_result`, for a command that must leave nothing new in its output folder."""

    def run(argv: list[object], *, output: Path | None = None) -> str:
        output = output or tmp_path / "out"
        before = files_in(output)
        line = wrong_result(argv)
        assert files_in(output) - before == set()
        return line

    return run
