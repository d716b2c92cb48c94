"""A run resumes with the settings that make it the same run, and is told what differs."""

from pathlib import Path

import pytest

from verippo.core.training.run import check_unchanged
from verippo.launch import cli
from verippo.sft.config import SFTConfig

BEFORE = {"data": "a.json", "seed": 0, "limit": None, "weight_decay": 0.1}


def check(**changes):
    fixed = SFTConfig(model="m", data="a.json", output="o").fixed
    check_unchanged(fixed, BEFORE, {**BEFORE, **changes}, where=Path("runs/x/step-1"))


def test_settings_that_take_effect_may_change():
    check(weight_decay=0.0)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"data": "b.json"}, "data a.json -> b.json"),
        ({"limit": 5, "seed": 2}, "limit None -> 5, seed 0 -> 2"),
    ],
)
def test_settings_that_would_redraw_the_data_are_refused(changes, shown):
    with pytest.raises(ValueError, match=f"{shown}: set them back, or .* --resume never"):
        check(**changes)


def test_another_way_to_write_a_path_is_no_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    check(data=str(tmp_path / "a.json"))


@pytest.fixture
def sft(tmp_path, make_model):
    """Runs SFT in this process on six little rows, with further options."""
    model = make_model()
    data = tmp_path / "d.json"
    data.write_text(
        str([{"Question": f"q{n}", "Response": "a"} for n in range(6)]).replace("'", '"')
    )

    def run(**options):
        settings = {
            "model": model,
            "data": data,
            "output": tmp_path / "out",
            "dtype": "fp32",
            "batch_size": 2,
            "epochs": 1,
            "save_every": 1,
            "log_to": "jsonl",
        }
        pairs = [(f"--{name}", str(value)) for name, value in (settings | options).items()]
        cli.main(["sft", *[part for pair in pairs for part in pair]])

    return run


def test_new_weight_decay_takes_effect_when_a_run_resumes(sft, monkeypatch, tmp_path):
    from verippo.core.training.engine import TrainEngine

    sft(max_steps=1)
    decays = []
    step = TrainEngine.step

    def recorded(engine, learning_rate):
        decays.append([group["weight_decay"] for group in engine.optimizer.param_groups])
        return step(engine, learning_rate)

    monkeypatch.setattr(TrainEngine, "step", recorded)
    sft(max_steps=2, weight_decay=0.5)
    assert decays == [[0.5, 0.0]]


def test_another_seed_is_refused_when_a_run_resumes(sft, capsys):
    sft(max_steps=1)
    with pytest.raises(SystemExit) as caught:
        sft(max_steps=2, seed=1)
    assert caught.value.code == 2
    assert "seed 0 -> 1: set them back" in capsys.readouterr().err
