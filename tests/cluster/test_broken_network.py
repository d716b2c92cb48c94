"""Links that are cut, hosts and ranks that are stopped: every side ends and names the other."""

from __future__ import annotations

import random
import re
import signal
import time

import pytest

END_SECONDS = 90
LAUNCHER_SECONDS = 120
"""Time that a launcher may take to end after its ranks: seconds, but more on a busy machine."""
PHASES = "rollout|score|forward|train|sync|evaluate|save"
# fault -> the host that it takes away, of two; the first one serves the store of the ranks
LOST = {"link cut": 1, "host stopped": 0, "rank stopped": 1}


def break_host(network, fault, host):
    """Makes a fault."""
    if fault == "link cut":
        network.cut(host)
    elif fault == "host stopped":
        network.signal_all(host, signal.SIGSTOP)
    else:
        network.rank_on(host).send_signal(signal.SIGSTOP)


def lines_of_end(program, num_ranks=1):
    """Waits until the ranks of a launcher have ended, and it after them; returns their lines."""
    begun = time.monotonic()
    while len(program.lines()) < num_ranks:
        assert time.monotonic() < begun + END_SECONDS, program.output.read_text()[-3000:]
        time.sleep(0.1)
    seconds = time.monotonic() - begun
    program.process.wait(timeout=LAUNCHER_SECONDS)
    print(f"ranks ended after {seconds:.1f} s, launcher after {time.monotonic() - begun:.1f} s")
    assert program.process.returncode != 0
    lines = program.lines()
    print("\n".join(lines))
    assert len(lines) == num_ranks
    return lines


def check_line(line, network, rank, lost):
    """The line with which a rank ends names the lost rank, its host and its phase."""
    pattern = (
        rf"verippo: rank {rank} stops: no sign of life for \d+ s from rank {lost} "
        rf"\(host {network.name(lost)}, {network.address(lost)}; last in phase ({PHASES})\): "
        r"stopped, killed or out of reach: check that host and the network, then run the same "
        r"command again to resume"
    )
    assert re.fullmatch(pattern, line)


@pytest.mark.parametrize("fault", LOST)
def test_every_side_names_the_lost_host_and_the_run_resumes(
    fault, network, launch, arguments, unbroken, wait_for_steps, finish, check_same, tmp_path
):
    """Under torchrun. A process that is stopped ends once it is continued."""
    lost = LOST[fault]
    reference = unbroken(2)
    argv = arguments(tmp_path / "run", heartbeat_seconds=12)
    programs = launch("torchrun", 2, argv)
    wait_for_steps(tmp_path / "run", 3, programs)
    time.sleep(random.uniform(0.0, 1.0))
    break_host(network, fault, lost)
    (line,) = lines_of_end(programs[1 - lost])
    check_line(line, network, 1 - lost, lost)
    if fault != "link cut":
        network.signal_all(lost, signal.SIGCONT)
    (line,) = lines_of_end(programs[lost])
    assert f"rank {1 - lost} (host {network.name(1 - lost)}" in line or fault == "rank stopped"
    network.restore()
    finish(launch("torchrun", 2, argv))
    check_same(tmp_path / "run", reference)


def test_cut_link_between_three_hosts_of_a_hostfile_with_default_settings(
    network, launch, arguments, unbroken, wait_for_steps, finish, check_same, tmp_path
):
    """Under deepspeed, pdsh and ssh (stand-ins), started by our command."""
    reference = unbroken(3)
    argv = arguments(tmp_path / "run")
    programs = launch("deepspeed", 3, argv)
    wait_for_steps(tmp_path / "run", 3, programs)
    network.cut(2)
    lines = {int(line.split()[2]): line for line in lines_of_end(programs[0], num_ranks=3)}
    check_line(lines[2], network, 2, 0)
    for rank in (0, 1):
        check_line(lines[rank], network, rank, 2)
    network.restore()
    finish(launch("deepspeed", 3, argv))
    check_same(tmp_path / "run", reference)


def test_signal_to_our_deepspeed_command_reaches_ranks_on_other_hosts(
    network, launch, arguments, unbroken, wait_for_steps, finish, check_same, tmp_path
):
    reference = unbroken(2)
    argv = arguments(tmp_path / "run")
    programs = launch("deepspeed", 2, argv)
    wait_for_steps(tmp_path / "run", 3, programs)
    programs[0].process.send_signal(signal.SIGUSR1)
    finish(programs)
    assert "verippo: SIGUSR1: step" in programs[0].output.read_text()
    assert not (tmp_path / "run" / "model").exists()
    finish(launch("deepspeed", 2, argv))
    check_same(tmp_path / "run", reference)
