"""Runs killed at random moments end with the same bits as uninterrupted ones."""

from __future__ import annotations

import random
import time

import pytest

from verippo.launch import cli


@pytest.mark.parametrize(
    ("stage", "changes"),
    [("sft", {}), ("ppo", {}), ("ppo", {"lora.rank": 4, "policy_learning_rate": 1e-2})],
    ids=["sft", "ppo", "ppo_with_adapters"],
)
def test_run_killed_twice_ends_with_the_same_bits(
    stage, changes, runs, unbroken, check_same, start, rows_of, wait_for_steps, tmp_path, capfd
):
    output = tmp_path / "run"
    argv = runs.arguments(stage, output, save_every=2, **changes)
    for round_ in range(2):
        process = start("-m", "verippo.launch.cli", *argv)
        wait_for_steps(output, 1 + 2 * round_, process)
        delay = random.uniform(0.0, 0.4)
        time.sleep(delay)
        process.kill()
        process.wait()
        print(f"killed {delay:.2f} s later, with {len(rows_of(output))} steps logged")
    cli.main(argv)
    assert "resuming after step" in capfd.readouterr().out
    if changes:
        expected = tmp_path / "unbroken"
        cli.main(runs.arguments(stage, expected, **changes))
    else:
        expected = unbroken(stage)
    check_same(output, expected)
