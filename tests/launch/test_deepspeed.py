"""The signals that `verippo.launch.deepspeed` sends to other hosts. Real ranks: tests/fault, tests/cluster."""

from __future__ import annotations

import re
import signal

from verippo.launch.deepspeed import remote_signal

PYTHON = "/opt/venv-3.11/bin/python"
LAUNCH = ["-u", "-m", "deepspeed.launcher.launch", "--world_info=eyJhIjogWzBdfQ=="]
PORTS = ["--node_rank=%n", "--master_addr=10.0.0.1", "--master_port=29500"]
PDSH = ["pdsh", "-S", "-f", "1024", "-w", "node1,node2", "-l", "me"]
STARTED = [*PDSH, "export A=b; ", "cd /work;", PYTHON, *LAUNCH, *PORTS, "--module", "x", "ppo"]


def test_remote_signal_keeps_the_options_of_pdsh():
    command = remote_signal(STARTED, signal.SIGUSR1)
    assert command[:-1] == PDSH
    assert command[-1].startswith('pkill -USR1 -P "$(pgrep -d, -f ')


def test_remote_signal_goes_past_a_script_that_sets_the_environment_up():
    sourced = [*PDSH, "source /env;", *STARTED[len(PDSH) :]]
    assert remote_signal(sourced, signal.SIGTERM) == remote_signal(STARTED, signal.SIGTERM)


def test_pattern_matches_the_launcher_and_not_the_shell_around_it_or_another_run():
    (pattern,) = re.findall(r"-f '(.*)'", remote_signal(STARTED, signal.SIGTERM)[-1])
    launcher = " ".join([PYTHON, *LAUNCH, "--node_rank=1", *PORTS[1:], "--module", "x"])
    assert re.search(pattern, launcher)
    assert not re.search(pattern, f"sh -c export A=b; cd /work; {launcher}")
    assert not re.search(pattern, launcher.replace("29500", "29501"))
    assert not re.search(pattern, launcher.replace("eyJ", "eyK"))
    assert "%" not in pattern  # pdsh would replace it
