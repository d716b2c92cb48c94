"""Two ranks: signals that reach only some of them, ranks that hang, die or cannot be reached."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = {"max_steps": 400, "save_every": 1000, "eval_every": 1000, "eval_fraction": 0.0}
NOISE = re.compile("Traceback|gloo|terminate called|c10d", re.IGNORECASE)


def launcher_arguments():
    port = str(random.randrange(20000, 30000))
    program = str(Path(sys.executable).parent / "deepspeed")
    options = ["--num_accelerators", "2", "--master_port", port, "--no_local_rank", "--module"]
    return [program, *options, "verippo.launch.cli"]


def finish(ranks):
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors[0][-3000:]


@pytest.fixture(scope="module")
def unbroken_pair(runs, start_ranks, tmp_path_factory):
    """Folder of an uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    finish(start_ranks(runs.arguments("sft", folder, max_steps=60)))
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_under_deepspeed_stops_both_ranks_at_one_step(
    number, runs, start, start_ranks, unbroken_pair, wait_for_steps, check_same, rows_of, tmp_path
):
    """A terminal sends SIGINT to the launcher and the ranks alike; the launcher adds SIGTERM, to
    one rank after the other."""
    argv = runs.arguments("sft", tmp_path / "run", max_steps=60)
    process = start(*launcher_arguments(), *argv)
    wait_for_steps(tmp_path / "run", 3, process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:  # as a scheduler would: to the ranks' launcher alone
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        )
        os.kill(int(children.stdout.split()[0]), number)
    out, err = process.communicate(timeout=60)
    text = f"{out}{err}"
    (saved,) = re.findall(r"verippo: \w+: step (\d+) is saved in", text)
    assert int(saved) == rows_of(tmp_path / "run")[-1]["step"]
    if number == signal.SIGINT:
        finish(start_ranks(argv))
        check_same(tmp_path / "run", unbroken_pair)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_to_our_deepspeed_command_saves_and_resumes(
    number, runs, start, unbroken_pair, wait_for_steps, check_same, rows_of, tmp_path
):
    """Where deepspeed's own front end would leave the ranks running."""
    argv = runs.arguments("sft", tmp_path / "run", max_steps=60)
    command = ["-m", "verippo.launch.deepspeed", *launcher_arguments()[1:], *argv]
    process = start(*command)
    wait_for_steps(tmp_path / "run", 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    (saved,) = re.findall(rf"verippo: {number.name}: step (\d+) is saved in", out)
    assert int(saved) == rows_of(tmp_path / "run")[-1]["step"] < 60
    again = start(*command)
    _, err = again.communicate(timeout=240)
    assert again.returncode == 0, err[-3000:]
    check_same(tmp_path / "run", unbroken_pair)


def test_our_deepspeed_command_passes_the_exit_status_on(runs, start, tmp_path):
    argv = runs.arguments("sft", tmp_path / "run", model=tmp_path / "none")
    process = start("-m", "verippo.launch.deepspeed", *launcher_arguments()[1:], *argv)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "verippo: sft: model" in err


def test_signal_to_one_rank_stops_both(runs, start_ranks, wait_for_steps, tmp_path):
    ranks = start_ranks(runs.arguments("sft", tmp_path / "run", **STEPS))
    wait_for_steps(tmp_path / "run", 2, ranks[0])
    ranks[1].send_signal(signal.SIGUSR1)
    results = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], results
    assert "verippo: SIGUSR1: step" in results[0][0]
    assert "(with the same launcher)" in results[0][0]
    assert "is saved" not in results[1][0]


def test_signals_while_two_ranks_load_end_both(runs, start_ranks, wait_for_handler, tmp_path):
    ranks = start_ranks(runs.arguments("sft", tmp_path / "run", max_steps=400))
    for rank in ranks:
        wait_for_handler(rank.pid, signal.SIGTERM)
    ranks[0].send_signal(signal.SIGTERM)
    ranks[1].send_signal(signal.SIGTERM)
    results = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], results
    assert "verippo: SIGTERM: no step was taken since this start; to go on:" in results[0][0]


@pytest.mark.parametrize(("stage", "hung"), [("sft", 0), ("ppo", 1)])
def test_stopped_rank_ends_the_other_with_one_line(
    stage, hung, runs, start_ranks, wait_for_steps, tmp_path
):
    """Rank 0 serves the store through which the ranks see each other."""
    changes = STEPS if stage == "sft" else {"steps": 400, "eval_fraction": 0.0}
    ranks = start_ranks(runs.arguments(stage, tmp_path / "run", heartbeat_seconds=8, **changes))
    wait_for_steps(tmp_path / "run", 2, ranks[0])
    time.sleep(random.uniform(1.0, 2.0))
    ranks[hung].send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    _, err = ranks[1 - hung].communicate(timeout=60)
    seconds = time.monotonic() - begun
    print(f"ended after {seconds:.1f} s")
    assert seconds < 8 + 5
    assert ranks[1 - hung].returncode == 1
    last = [line for line in err.splitlines() if line.startswith("verippo:")]
    assert len(last) == 1, err
    phases = "rollout|score|forward|train|sync|load|save"
    assert re.search(
        rf"rank {1 - hung} stops: no sign of life for \d+ s from rank {hung} "
        rf"\(host {socket.gethostname()}, 127\.0\.0\.1; last in phase ({phases})\): "
        "stopped, killed or out of reach: check that host and the network, then run the same "
        "command again to resume$",
        last[0],
    )
    assert not NOISE.search(err), err


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_rank_is_named_by_the_other(killed, runs, start_ranks, wait_for_steps, tmp_path):
    ranks = start_ranks(runs.arguments("sft", tmp_path / "run", **STEPS))
    wait_for_steps(tmp_path / "run", 2, ranks[0])
    time.sleep(1.5)
    ranks[killed].kill()
    begun = time.monotonic()
    _, err = ranks[1 - killed].communicate(timeout=60)
    print(f"ended after {time.monotonic() - begun:.1f} s")
    assert ranks[1 - killed].returncode == 1
    lines = [line for line in err.splitlines() if line.startswith("verippo:")]
    assert len(lines) == 1, err
    assert f"rank {1 - killed} stops: " in lines[0]
    assert f"rank {killed} " in lines[0].partition("stops:")[2]
    assert not NOISE.search(err), err


def test_rank_that_never_returns_is_named_with_its_phase(runs, start_ranks, tmp_path, monkeypatch):
    """Its process lives, but it does not come to the collective operation of the others."""
    (tmp_path / "endless.py").write_text(
        "import os, time\n"
        "def score(rollouts):\n"
        "    time.sleep(600 if os.environ['RANK'] == '1' else 0)\n"
        "    return [0.5] * len(rollouts)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    changes = {
        "verifier.kind": "function",
        "verifier.function": "endless:score",
        "timeout_seconds": 10,
        "eval_fraction": 0.0,
    }
    ranks = start_ranks(runs.arguments("ppo", tmp_path / "run", **changes))
    errors = [rank.communicate(timeout=90)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    for number, err in enumerate(errors):
        (line,) = [line for line in err.splitlines() if line.startswith("verippo:")]
        assert f"rank {number} stops: a collective operation failed in phase score" in line
        assert f"to which rank 1 (host {socket.gethostname()}, 127.0.0.1; " in line
        assert "last in phase score) did not come in time" in line
        assert "Traceback" not in err


def test_rank_that_is_never_started_ends_the_other_with_one_line(runs, start, tmp_path):
    process = start(
        *("-m", "verippo.launch.cli"),
        *runs.arguments("sft", tmp_path / "run", timeout_seconds=5),
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(random.randrange(20000, 30000)),
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "not all 2 ranks met at 127.0.0.1:" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("stage", "zero"), [("sft", 3), ("ppo", 1)])
def test_stopped_run_goes_on_with_one_rank_and_another_stage(
    stage, zero, runs, start, start_ranks, wait_for_steps, rows_of, tmp_path
):
    length = "max_steps" if stage == "sft" else "steps"
    options = {length: 12, "warmup_ratio": 0.0} if stage == "sft" else {length: 12}
    two = runs.arguments(stage, tmp_path / "two", zero_stage=2, **options)
    finish(start_ranks(two))
    ranks = start_ranks([*two, "--output", str(tmp_path / "run")])
    wait_for_steps(tmp_path / "run", 3, ranks[0])
    ranks[0].send_signal(signal.SIGUSR1)
    finish(ranks)
    assert len(rows_of(tmp_path / "run")) < 12
    alone = start(
        *("-m", "verippo.launch.cli", *two),
        *("--output", str(tmp_path / "run"), "--zero_stage", str(zero)),
    )
    out, err = alone.communicate(timeout=300)
    assert alone.returncode == 0, err[-3000:]
    assert "of 2 ranks, states sharded: converted for 1 ranks" in out
    found, expected = (
        [row["loss"] if stage == "sft" else row["score_mean"] for row in rows_of(tmp_path / name)]
        for name in ("run", "two")
    )
    assert found == pytest.approx(expected, abs=1e-4)
