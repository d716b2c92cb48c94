"""The space that a run needs, against hand-worked numbers and a checkpoint on disk."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from verippo.launch import cli
from verippo.launch.doctor.disk import needed_bytes
from verippo.rl.config import PPOConfig, SamplerConfig, VerifierConfig
from verippo.sft.config import SFTConfig


def ppo(**options):
    verifier = VerifierConfig(kind="exact")
    return PPOConfig(policy="p", data="d", output="o", steps=1, verifier=verifier, **options)


def test_bf16_checkpoints_hold_fourteen_bytes_a_parameter():
    config = ppo(save_total_limit=2, zero_stage=1)
    needed = needed_bytes(config, {"policy": 100, "critic": 10, "verifier": 1000})
    # 110 x (2 + 4 + 8), two kept and one being written; 100 x 2 exported
    assert needed == {"checkpoints": 110 * 14 * 3, "exported models": 200}


def test_evaluation_adds_the_best_checkpoint_and_model():
    config = ppo(save_total_limit=1, eval_fraction=0.1, reference_refresh_steps=5)
    needed = needed_bytes(config, {"policy": 100})
    assert needed == {"checkpoints": (100 * 12 + 200) * 3, "exported models": 400}


def test_servers_that_read_from_disk_need_the_weights_once():
    sampler = SamplerConfig(kind="sglang", urls="http://h:1")
    needed = needed_bytes(ppo(sampler=sampler, dtype="fp32"), {"policy": 100})
    assert needed["weights for the servers"] == 400


@pytest.mark.parametrize(
    ("dtype", "stage", "bytes_each"),
    [("fp32", 0, 12), ("fp32", 1, 16), ("fp32", 3, 12), ("bf16", 1, 14), ("bf16", 3, 12)],
)
def test_a_real_checkpoint_has_the_predicted_size(
    make_model, tmp_path, write_rows, dtype, stage, bytes_each
):
    model = make_model("llama", vocab=8192)
    rows = [{"Question": f"Q{n}", "Response": f"A{n}"} for n in range(4)]
    options = {
        "model": model,
        "data": write_rows("rows.json", rows),
        "output": tmp_path / "out",
        "max_steps": 1,
        "batch_size": 2,
        "dtype": dtype,
        "zero_stage": stage,
    }
    cli.main(["sft", *[f"--{name}={value}" for name, value in options.items()]])
    checkpoint = tmp_path / "out" / "checkpoints" / "step-00000001"
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    num = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())
    assert size == pytest.approx(bytes_each * num, rel=0.05)
    config = SFTConfig(model="m", data="d", output="o", dtype=dtype, zero_stage=stage)
    kept = config.save_total_limit + 1
    assert needed_bytes(config, {"model": num})["checkpoints"] == bytes_each * num * kept
