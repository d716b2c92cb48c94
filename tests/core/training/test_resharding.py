"""A run resumes on another number of ranks or another ZeRO stage, to the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from verippo.core.training.engine import EngineConfig, TrainEngine
from verippo.core.training.pretrained import load_policy
from verippo.core.training.resharding import Layout

SCRIPT = str(Path(__file__).parent / "resharding_checks.py")


@pytest.fixture(scope="module")
def folder(make_model, two_ranks, tmp_path_factory):
    """Checkpoints of stretches of six steps in all."""
    model = str(make_model("qwen2", tied=True, seed=3))  # biases: vectors, without weight decay
    place = tmp_path_factory.mktemp("stretches")

    def launch(ranks, *stretches):
        done = two_ranks(
            SCRIPT, model, str(place), *stretches, timeout=500, env={"VERIPPO_RANKS": ranks}
        )
        assert done.returncode == 0, done.stderr[-4000:]

    launch("2", "unbroken:3::6", "two:3::2")
    launch("1", "one:3:two:2", "one-stage2:2:two:2")
    launch("2", "two-again:3:one:2", "stage3-again:3:one-stage2:2", "stage2:2:two:4")
    return place


@pytest.mark.parametrize("name", ["two-again", "stage3-again", "stage2"])
def test_other_ranks_or_stages_end_at_the_weights_of_an_unbroken_run(folder, name):
    expected, ours = (torch.load(folder / n / "weights.pt") for n in ("unbroken", name))
    assert expected.keys() == ours.keys()
    for key in expected:
        torch.testing.assert_close(ours[key], expected[key], atol=1e-6, rtol=0)
    early = torch.load(folder / "one" / "weights.pt")
    assert any((early[key] - expected[key]).abs().max() > 1e-3 for key in expected)


def test_conversion_leaves_nothing_behind(folder):
    names = {"unbroken", "two", "one", "one-stage2", "two-again", "stage3-again", "stage2"}
    assert {path.name for path in folder.iterdir()} == names


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("two", Layout("parameters", 2)),
        ("one", Layout("parameters", 1)),
        ("one-stage2", Layout("states", 1)),
        ("stage2", Layout("states", 2)),
    ],
)
def test_the_layout_of_a_checkpoint_is_read_from_its_files(folder, name, layout):
    assert Layout.of_checkpoint(folder / name / "policy") == layout


def test_a_checkpoint_without_shards_cannot_be_converted(make_model, tmp_path):
    model = make_model()

    def engine(stage):
        config = EngineConfig(zero_stage=stage, dtype="fp32", gradient_checkpointing=False)
        return TrainEngine(load_policy(model, dtype="fp32"), config)

    engine(0).save(tmp_path, "policy")
    with pytest.raises(ValueError, match="set the zero_stage of the earlier run"):
        engine(3).load(tmp_path, "policy")
