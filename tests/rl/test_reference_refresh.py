"""Every n steps the reference takes the policy's weights, also in a run that resumes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from verippo.rl.config import KLConfig, PPOConfig, VerifierConfig
from verippo.rl.train import train


@pytest.fixture
def refreshing(task):
    return task | {
        "kl": KLConfig(coef=0.1),
        "steps": 6,
        "reference_refresh_steps": 2,
        "save_every": 3,
        "samples_per_prompt": 2,
    }


def run(**settings):
    folder = train(PPOConfig(**settings), resolved={})
    return folder, [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


def test_divergence_starts_again_after_each_refresh(refreshing):
    _, rows = run(**refreshing)
    assert [row["reference_step"] for row in rows] == [0, 0, 2, 2, 4, 4]
    assert [row["kl_mean"] == 0.0 for row in rows] == [True, False] * 3


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_resumed_run_has_the_refreshed_reference(refreshing, tmp_path, zero_stage):
    settings = refreshing | {"zero_stage": zero_stage}
    whole, rows = run(**settings | {"output": str(tmp_path / "whole")})
    run(**settings | {"steps": 3})  # the reference is that of step 2, the policy that of step 3
    folder, resumed = run(**settings)
    assert [row["kl_mean"] for row in resumed] == [row["kl_mean"] for row in rows]
    first, second = (load_file(path / "model" / "model.safetensors") for path in (whole, folder))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_the_option_no_reference_is_saved(refreshing):
    folder, rows = run(**refreshing | {"reference_refresh_steps": None, "steps": 3})
    assert not list(folder.glob("checkpoints/*/reference*"))
    assert "reference_step" not in rows[0]


def test_a_reference_of_another_architecture_cannot_take_the_weights(refreshing, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(refreshing["policy"])
    config.intermediate_size = 48
    other = tmp_path / "other"
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    for file in (tmp_path / "policy").glob("token*"):
        (other / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        ValueError, match=r"reference .*other: its weight .*mlp.* is not of the pol"
    ):
        run(**refreshing | {"reference": str(other)})
    options = {"policy": "m", "data": "d", "output": "o", "steps": 1}
    config = PPOConfig(verifier=VerifierConfig(kind="exact"), **options)
    assert "reference_refresh_steps" in config.fixed
