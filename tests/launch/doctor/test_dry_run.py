"""Every shipped configuration passes the checks and runs small; what a dry run replaces is said."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from verippo.core.llm.config import LLMConfig
from verippo.launch.doctor import disk, dry_run
from verippo.launch.doctor.config import PPODoctorConfig, VerifierDoctorConfig
from verippo.launch.doctor.small_model import shrunk
from verippo.rl.config import CorrectionConfig, SamplerConfig, VerifierConfig

CONFIGS = Path(__file__).resolve().parents[3] / "launch" / "configs"
STAGES = ("ppo", "sft", "verifier")
SHIPPED = [p.stem for p in sorted(CONFIGS.glob("*.yaml")) if set(p.stem.split("_")) & {*STAGES}]
LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
}


def sizes(hidden, intermediate, layers, heads, **others):
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **others,
    }


# config.json of the published architectures, as far as their sizes go
ARCHITECTURES = {
    "llama-3B": LLAMA3 | sizes(3072, 8192, 28, 24, tie_word_embeddings=True),
    "llama-8B": LLAMA3 | sizes(4096, 14336, 32, 32),
    "llama-70B": LLAMA3 | sizes(8192, 28672, 80, 64),
    "qwen-0.5B": QWEN2
    | sizes(896, 4864, 24, 14, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "qwen-3B": QWEN2
    | sizes(
        2048, 11008, 36, 16, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True
    ),
    "qwen-7B": QWEN2 | sizes(3584, 18944, 28, 28, num_key_value_heads=4),
    "qwen-72B": QWEN2 | sizes(8192, 29568, 80, 64, num_key_value_heads=8),
    "tiny": sizes(128, 384, 2, 4) | {"model_type": "llama", "vocab_size": 512},
}
QUICK = ("ppo_8b", "ppo_tiny_cpu", "sft_7b", "verifier_3b")
"""One configuration of each stage and family; the others differ in sizes, which are cut down."""


def architecture(config, name):
    """The architecture of a model that a shipped configuration names."""
    if config == "ppo_tiny_cpu" or config.startswith("demo_"):
        return "tiny"
    if found := re.search(r"(?<!\d)(0\.5|3|7|8|70|72)B", name):
        size = found[1]
    else:  # the folder of an earlier stage
        size = {"05b": "0.5", "3b": "3", "7b": "7", "8b": "8"}[config.split("_")[-1]]
    llama = size in ("8", "70") or (size == "3" and "Qwen" not in name)
    return f"{'llama' if llama else 'qwen'}-{size}B"


@pytest.fixture
def write_model(tmp_path, templated):
    """Writes a model's config.json and tokenizer, and a file with one of its weights."""

    def write(role, kind):
        folder = tmp_path / role
        config = ARCHITECTURES[kind]
        AutoTokenizer.from_pretrained(templated).save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config))
        weights = {"model.norm.weight": torch.ones(config["hidden_size"])}
        if role == "verifier":
            weights["score.weight"] = torch.zeros(2, config["hidden_size"])
        save_file(weights, folder / "model.safetensors")
        return str(folder)

    return write


def rows(stage, num):
    questions = [f"What is {n} plus one?" for n in range(num)]
    if stage == "ppo":
        keys = ("Open-ended Verifiable Question", "Ground-True Answer")
        return [dict(zip(keys, (q, str(n + 1)), strict=True)) for n, q in enumerate(questions)]
    if stage == "sft":
        keys = ("Question", "Complex_CoT", "Response")
        return [dict(zip(keys, (q, "Add one.", "It is."), strict=True)) for q in questions]
    return [{"response": q, "reference": "x", "label": n % 2} for n, q in enumerate(questions)]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in SHIPPED],
)
def test_every_shipped_configuration_passes(
    name, doctor, write_model, write_rows, tmp_path, monkeypatch
):
    (stage,) = set(name.split("_")) & {*STAGES}
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(2**45, 0, 2**45))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    options = {"config": CONFIGS / f"{name}.yaml", "output": tmp_path / "out", "dry_run": "true"}
    given = rows(stage, 200)
    options["data"] = write_rows("rows.json", given[:150])
    if "eval_data" in content:
        options["eval_data"] = write_rows("held_out.json", given[150:])
    if template := content.get("template") or content.get("verifier", {}).get("template"):
        file = tmp_path / "template.txt"
        file.write_text("Response: {response}\nReference: {reference}</s>")
        options["template" if stage == "verifier" else "verifier.template"] = file
        assert template
    for role in ("model", "policy", "critic", "reference"):
        if role in content:
            options[role] = write_model(role, architecture(name, content[role]))
    verifier = content.get("verifier", {}).get("model")
    if verifier:
        options["verifier.model"] = write_model("verifier", architecture(name, verifier))
    if "urls" in content.get("sampler", {}):
        options |= {"sampler.kind": "local", "sampler.sleep": "false"}  # no servers here
    status, lines = doctor(stage, options)
    assert status == 0
    assert [line for line in lines if line.startswith("  FAILED")] == []
    assert re.search(r"two steps: 2 steps on CPU in fp32, resumed after the first", lines[-2])
    assert not list((tmp_path / "temporary").glob("verippo-dry-run-*"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_shrunk_configuration_keeps_family_and_vocabulary(kind):
    own = AutoConfig.for_model(**ARCHITECTURES[kind])
    small = shrunk(own)
    assert small.model_type == own.model_type
    assert small.vocab_size == own.vocab_size
    assert (small.num_hidden_layers, small.hidden_size) == (2, 32)
    shares = own.num_attention_heads > own.num_key_value_heads
    assert (small.num_attention_heads > small.num_key_value_heads) == shares
    model = AutoModelForCausalLM.from_config(small)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, own.vocab_size)


@pytest.fixture
def options(policy, problems_file, tmp_path):
    (tmp_path / "small").mkdir()
    return {"policy": str(policy), "data": str(problems_file), "output": str(tmp_path / "out")}


def test_servers_and_judge_are_replaced_and_that_is_said(options, tmp_path):
    config = PPODoctorConfig(
        **options,
        steps=100,
        offload="all",
        verifier=VerifierConfig(kind="judge"),
        llm=LLMConfig(model="gpt", base_url="http://h:1/v1"),
        sampler=SamplerConfig(kind="sglang", urls="http://h:1", sleep=True),
        correction=CorrectionConfig(level="token"),
        lam=0.9,
    )
    small, notes = dry_run.small_run(config, tmp_path / "small")
    assert isinstance(small, PPODoctorConfig)
    assert small.sampler == SamplerConfig()
    assert small.llm == LLMConfig()
    assert small.verifier.kind == "exact"
    assert (small.dtype, small.offload, small.zero_stage) == ("fp32", "none", 3)
    assert (small.lam, small.correction.level) == (0.9, "token")  # the algorithm stays
    assert "the local sampler in place of sglang" in notes
    assert "exact answers in place of the LLM judge" in notes
    assert "without offload=all" in notes


def test_answers_that_an_llm_labels_are_made_up(options, tmp_path):
    policy = options.pop("policy")
    config = VerifierDoctorConfig(**options, model=policy, llm=LLMConfig(model="gpt"))
    small, notes = dry_run.small_run(config, tmp_path / "small")
    assert json.loads(Path(small.data).read_text())[1] == {
        "response": "It is 1.",
        "reference": "1",
        "label": False,
    }
    assert notes == ["made-up answers in place of those that the LLM labels"]


def test_a_fault_of_the_users_function_is_named(doctor, healthy, tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text("def score(rollouts):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    wrong = {"verifier.kind": "function", "verifier.function": "my_scores:score", "dry_run": "true"}
    status, lines = doctor("ppo", healthy | wrong)
    assert status == 2
    (line,) = [line for line in lines if line.startswith("  FAILED")]
    assert "two steps: dry run: step 1 ended with status 2" in line
    assert "verifier.function=my_scores:score returned 1 scores for" in line


def test_a_dry_run_after_a_failure_is_left_out(doctor, healthy):
    status, lines = doctor("ppo", healthy | {"ranks": 3, "dry_run": "true"})
    assert status == 2
    assert "  warning  two steps: not run: correct the failures first" in lines


def test_every_field_of_a_stage_is_known_to_its_dry_run():
    """The options of the doctor itself are not passed on."""
    own = {field.name for field in dataclasses.fields(dry_run.DoctorOptions)}
    assert own == {"dry_run", "ranks", "connect_seconds"}
