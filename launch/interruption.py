"""What a command says, and returns, when a signal ends it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.training import stopping

TRAINING = ("sft", "verifier", "ppo", "critic", "demo")
"""Commands that SIGTERM and SIGUSR1 end in order, as SIGINT does."""
RESUMABLE = ("problems", "search", "eval", "demo")
"""Commands that keep what is finished and take it up again."""


def end(error: KeyboardInterrupt, name: str, arguments: Sequence[str], config: Any) -> int:
    """Prints one line: what ended the command, what is kept, and how to go on.

    Args:
        error: what was raised.
        name: the command.
        arguments: its arguments.
        config: its configuration; None if it was not read yet.

    Returns:
        The exit status.
    """
    stop = error if isinstance(error, stopping.Stopped) else None
    resume = "" if getattr(config, "resume", "auto") == "auto" else "--resume auto"
    if name in RESUMABLE:
        kept = "what is finished is kept"
    elif name in TRAINING:
        kept = _kept(config)
    else:
        kept = ""
    if os.environ.get("RANK", "0") != "0":
        pass
    elif stop is None or stop.exit_status:
        again = f"the same command{f' with {resume}' if resume else ''} resumes"
        line = f"interrupted: {kept}; {again}" if kept else "interrupted"
        print(f"verippo: {line}", file=sys.stderr, flush=True)
    else:
        command = shlex.join(["verippo", name, *arguments, *resume.split()])
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            command = f"{command} (with the same launcher)"
        print(f"verippo: {stop.signal.name}: {kept}; to go on: {command}", flush=True)
    if name not in TRAINING:
        return 1
    return stop.exit_status if stop else 130


def _kept(config: Any) -> str:
    if not stopping.training_began():
        return "no step was taken since this start"
    from ..core.training.checkpoint import find_resume

    found = find_resume(Path(config.output).expanduser(), "auto")
    if found is None:
        return "no step is finished, so that nothing is saved"
    return f"step {int(found.name.removeprefix('step-'))} is saved in {found}"
