"""Gradients that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from verippo.core.training.engine import TrainEngine
from verippo.launch import cli


def poison(monkeypatch, steps):
    """Makes the loss NaN in the micro-batches of some optimizer steps, counted from 1."""
    backward, step = TrainEngine.backward, TrainEngine.step
    taken = [1]

    def poisoned(self, loss_sum, num_tokens, *, last):
        factor = math.nan if taken[0] in steps else 1.0
        backward(self, loss_sum * factor, num_tokens, last=last)

    def counted(self, rate):
        taken[0] += 1
        return step(self, rate)

    monkeypatch.setattr(TrainEngine, "backward", poisoned)
    monkeypatch.setattr(TrainEngine, "step", counted)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_nan_gradient_is_skipped_and_counted(
    stage, zero_stage, runs, rows_of, tmp_path, monkeypatch
):
    poison(monkeypatch, {3})
    cli.main(runs.arguments(stage, tmp_path / "run", zero_stage=zero_stage))
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["skipped_steps"] == 1
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_nan_gradients_in_a_row_end_the_run_and_a_resume_goes_on_before_them(
    runs, unbroken, check_same, tmp_path, monkeypatch, capsys
):
    argv = runs.arguments("sft", tmp_path / "run")
    with monkeypatch.context() as patch:
        poison(patch, {6, 7, 8})
        with pytest.raises(RuntimeError, match="3 consecutive optimizer steps had a gradient"):
            cli.main(argv)
    cli.main(argv)
    assert "resuming after step 4 of 9" in capsys.readouterr().out
    check_same(tmp_path / "run", unbroken("sft"))
