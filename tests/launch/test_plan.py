"""`verippo plan`: what it prints, advises and refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from verippo.core.sampling.sampler import SamplingParams
from verippo.launch import cli
from verippo.launch.plan import make_plan
from verippo.launch.plan_config import PPOPlanConfig, SFTPlanConfig
from verippo.launch.plan_memory import GIB
from verippo.launch.plan_stage import name_stage
from verippo.launch.plan_table import plan_text
from verippo.rl.config import SamplerConfig, VerifierConfig

CONFIGS = Path(__file__).resolve().parents[2] / "launch" / "configs"
LLAMA_8B = "meta-llama/Llama-3.1-8B"
SFT = SFTPlanConfig(model=LLAMA_8B)
PPO = PPOPlanConfig(
    policy=LLAMA_8B,
    steps=10,
    verifier=VerifierConfig(kind="exact"),
    sampling=SamplingParams(max_new_tokens=1000),
)


def parts(plan, *, phase=None):
    return {p.name: p for p in plan.memory.parts if phase is None or p.phase == phase}


def test_states_of_sft_add_up_by_hand():
    found = parts(make_plan(SFT))
    eighth = 8_030_261_248 / 8
    assert found["model: weights"].gpu == 2 * eighth
    assert found["model: optimizer states"].gpu == 12 * eighth
    assert found["model: gradients"].gpu == 2 * eighth


def test_ppo_has_a_part_for_every_model():
    names = {name.partition(":")[0] for name in parts(make_plan(PPO))}
    assert names >= {"policy", "critic", "reference", "local sampler"}
    config = replace(PPO, verifier=VerifierConfig(model=LLAMA_8B))
    assert "verifier: weights" in parts(make_plan(config))
    without = replace(PPO, advantage="reinforce++")
    assert not [name for name in parts(make_plan(without)) if name.startswith("critic")]


def test_peak_is_the_largest_phase():
    memory = make_plan(PPO).memory
    always = sum(p.gpu for p in memory.parts if not p.phase)
    assert memory.gpu == max(memory.phases.values())
    for phase, total in memory.phases.items():
        own = sum(p.gpu for p in memory.parts if p.phase == phase)
        assert total == pytest.approx(always + own)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_more_sharding_never_takes_more_states(stage):
    def states(stage):
        plan = make_plan(replace(SFT, zero_stage=stage))
        kinds = ("weights", "gradients", "optimizer states")
        return sum(p.gpu for n, p in parts(plan).items() if n.partition(": ")[2] in kinds)

    assert stage == 0 or states(stage) < states(stage - 1)


def test_servers_share_the_gpus_or_have_their_own():
    sampler = SamplerConfig(kind="sglang", urls="http://x:1", sleep=True)
    shared = make_plan(replace(PPO, sampler=sampler))
    assert parts(shared, phase="rollout")["servers: awake"].gpu == 30 * GIB  # 0.4 of 80, less 2
    assert parts(shared)["servers: asleep"].gpu == 2 * GIB
    # 32 GiB less the weights, at 128 KiB a token
    assert shared.server_tokens == (32 * GIB - 2 * 8_030_261_248) // 131072
    own = make_plan(replace(PPO, sampler=sampler, server_gpus=8))
    assert not [name for name in parts(own) if name.startswith("servers")]


def test_a_run_that_fits_on_the_machine_needs_no_change():
    plan = make_plan(SFT)
    assert plan.memory.fits
    assert plan.changes == []
    assert plan.smallest == 2
    assert make_plan(replace(SFT, gpus=plan.smallest)).memory.fits
    assert not make_plan(replace(SFT, gpus=1)).memory.fits


@pytest.mark.parametrize(
    ("fields", "first"),
    [
        ({"gradient_checkpointing": False, "gpu_memory": 40}, ["gradient_checkpointing=true"]),
        ({"zero_stage": 1, "gpu_memory": 48}, ["zero_stage=3"]),
        ({"gpus": 1, "gpus_per_node": 1}, ["offload=optimizer"]),
    ],
)
def test_the_change_that_costs_least_comes_first(fields, first):
    plan = make_plan(replace(SFT, **fields))
    assert not plan.memory.fits
    assert plan.changes == first
    assert plan.smallest_changed
    assert plan.smallest_changed <= plan.config.gpus


def test_several_changes_are_named_where_one_is_not_enough():
    plan = make_plan(replace(PPO, gpus=1, gpu_memory=24))
    assert len(plan.changes) > 1
    assert "it then " in plan_text(plan)


def test_a_policy_too_large_for_a_local_sampler_goes_to_servers_and_more_gpus():
    large = replace(PPO, policy="meta-llama/Llama-3.1-70B", critic=LLAMA_8B)
    plan = make_plan(large)
    assert plan.smallest is None
    assert "sampler.kind=sglang with servers on other GPUs" in plan.changes
    assert plan.smallest_changed
    assert f"it then needs {plan.smallest_changed} GPUs" in plan_text(plan)


def test_host_memory_bounds_offloading():
    plan = make_plan(replace(SFT, offload="optimizer", gpus=1, host_memory=128))
    # 18 bytes a parameter and half as much again
    assert plan.memory.host == 18 * 1.5 * 8_030_261_248
    assert not plan.memory.fits


def test_weights_that_are_converted_take_host_memory(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    small = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(small))
    plan = make_plan(replace(SFT, model=str(folder), gpus=2))
    number = plan.shapes["model"].parameters
    assert parts(plan)["loading with conversion"].host == 2 * 2 * number


def run(capsys, *arguments):
    cli.main(["plan", *map(str, arguments)])
    return capsys.readouterr().out


def test_the_table_has_parts_time_and_verdict(capsys):
    text = run(capsys, "--config", CONFIGS / "ppo_8b.yaml")
    for said in ("policy: optimizer states", "peak, in phase", "together", "assumed: ", "fits: "):
        assert said in text
    assert max(map(len, text.splitlines())) < 120


def test_json_holds_the_plan(capsys, tmp_path):
    line = run(capsys, "sft", "--model", LLAMA_8B, "--json", "-")
    row = json.loads(line)
    assert (row["fits"], row["smallest_gpus"], row["machine"]["gpus"]) == (True, 2, 8)
    assert row["seconds_per_step"] == sum(phase["seconds"] for phase in row["phases"])
    file = tmp_path / "plan.json"
    assert "fits" in run(capsys, "sft", "--model", LLAMA_8B, "--json", file)
    assert json.loads(file.read_text()) == row | {"machine": row["machine"] | {"json": str(file)}}


def test_the_stage_is_found_from_the_keys(tmp_path):
    def stage(text, *arguments):
        file = tmp_path / "run.yaml"
        file.write_text(text)
        return name_stage(["--config", str(file), *arguments])[0]

    assert stage("policy: x") == "ppo"
    assert stage("model: x") == "sft"
    assert stage("model: x\nthreshold: 0.4") == "verifier"
    assert stage("steps: 3", "--policy", "x") == "ppo"
    assert name_stage(["verifier", "--model", "x"]) == ["verifier", "--model", "x"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which stage?"),
        (["sft", "--model", "./no/such"], "model ./no/such: its config.json is not at hand"),
        (["sft", "--model", LLAMA_8B, "--gpus", "12"], "gpus=12: is not a multiple of"),
        (["sft", "--model", LLAMA_8B, "--gpu_memory", "3"], "gpu_reserve=4.0 leaves nothing"),
        (["sft", "--model", LLAMA_8B, "--gpu", "3"], "unknown option --gpu"),
    ],
)
def test_mistakes_end_in_one_line(refused, arguments, said):
    assert said in refused(["plan", *arguments])


def test_configurations_of_other_names_come_from_a_folder(capsys, tmp_path):
    folder = tmp_path / "acme" / "large"
    folder.mkdir(parents=True)
    known = {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 2}
    known |= {"num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864}
    (folder / "config.json").write_text(json.dumps(known))
    text = run(capsys, "sft", "--model", "acme/large", "--model_configs", tmp_path)
    assert "model: acme/large" in text
