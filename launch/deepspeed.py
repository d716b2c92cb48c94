"""Runs deepspeed so that signals reach the ranks: `python -m verippo.launch.deepspeed ARGUMENTS`.

By itself deepspeed's front end dies of SIGTERM and SIGUSR1 and leaves its ranks running, and its
launcher on each host answers them by killing the ranks after 30 seconds.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from ..core.training.stopping import SIGNALS

OTHER_LAUNCHERS = ("mpirun", "mpirun_rsh", "mpiexec", "mpiexec.hydra", "srun")
LAUNCHER = "deepspeed.launcher.launch"
"""The program that deepspeed starts on each host; its children are the ranks."""
KEEP_ALIVE = "-o ServerAliveInterval=15 -o ServerAliveCountMax=3"
"""Options of ssh with which a connection over a cut link ends within a minute."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `deepspeed ARGUMENTS` in a process group of its own and exits with its status.

    SIGINT, SIGTERM and SIGUSR1 go to every rank, which saves the last finished step and ends: on
    this host directly, on hosts of a hostfile through pdsh. Other launchers, such as mpirun and
    srun, get the signal themselves.

    Args:
        argv: arguments of deepspeed; None: those of the process.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    program = shutil.which("deepspeed", path=path)
    if program is None:
        print(f"verippo: deepspeed is not on the PATH: {path}", file=sys.stderr)
        sys.exit(2)
    ssh_options = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {KEEP_ALIVE}".strip()
    front_end = psutil.Popen(
        [program, *(sys.argv[1:] if argv is None else argv)],
        env=os.environ | {"PDSH_SSH_ARGS_APPEND": ssh_options},
        start_new_session=True,
    )
    for number in SIGNALS:
        signal.signal(number, lambda number, _: forward(front_end, signal.Signals(number)))
    status = front_end.wait()
    sys.exit(status if status >= 0 else 128 - status)


def forward(front_end: psutil.Process, number: signal.Signals) -> None:
    """Sends a signal to the ranks of a running deepspeed; without any yet, ends deepspeed.

    Args:
        front_end: the process of the command `deepspeed`.
        number: the signal.
    """
    programs = [(process, _command(process)) for process in front_end.children(recursive=True)]
    for process, command in programs:
        if "pdsh" in (Path(part).name for part in command[:2]) and LAUNCHER in command:
            environment = process.environ()
            subprocess.Popen(remote_signal(command, number), env=environment)
            return
    with contextlib.suppress(psutil.NoSuchProcess):  # processes that end meanwhile
        launchers = [process for process, command in programs if LAUNCHER in command]
        children = [child for launcher in launchers for child in launcher.children()]
        ranks = [child for child in children if "LOCAL_RANK" in child.environ()]
        others = [process for process, _ in programs if process.name() in OTHER_LAUNCHERS]
        for process in ranks + others:
            process.send_signal(number)
        if not ranks + others:
            os.killpg(front_end.pid, signal.SIGTERM)


def remote_signal(command: Sequence[str], number: signal.Signals) -> list[str]:
    """The pdsh command that sends a signal to the ranks that another pdsh command started.

    Args:
        command: arguments of deepspeed's pdsh: its options, the shell's `export ...; cd ...;`,
            and the launcher with its arguments.
        number: the signal.
    """
    place = command.index(LAUNCHER)
    python, world = command[place - 3], command[place + 1]
    options = [part for part in command[: place - 5] if not part.startswith("source ")]
    # anchored: the remote shells have the same text in their command lines, further on
    launcher = re.escape(f"{python} -u -m {LAUNCHER} {world} --node_rank=").replace("\\-", "-")
    port = next(part for part in command if part.startswith("--master_port="))
    pattern = f"^{launcher}[0-9]+ .*{port} "
    return [*options, f"pkill -{number.name[3:]} -P \"$(pgrep -d, -f '{pattern}')\""]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


if __name__ == "__main__":
    main()
