"""The shipped configurations parse and hold the paper's numbers (arXiv 2412.18925)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from verippo.core.planning.model_shape import model_shape
from verippo.eval.config import EvalConfig
from verippo.launch.cli import main, parse
from verippo.launch.commands import COMMANDS
from verippo.launch.plan import ARCHITECTURES, find_config
from verippo.rl.config import PPOConfig
from verippo.search.config import ProblemsConfig, SearchConfig
from verippo.sft.config import SFTConfig, VerifierTrainingConfig

CONFIGS = Path(__file__).resolve().parents[2] / "launch" / "configs"


PPO = [
    "ppo_8b",
    "ppo_8b_paper",
    "ppo_7b",
    "ppo_70b",
    "ppo_72b",
    "ppo_05b",
    "ppo_tiny_cpu",
    "demo_ppo",
]
PPO += ["demo_long_ppo", "demo_calculator_ppo"]
SFT = ["sft_8b", "sft_7b", "sft_7b_base", "sft_70b", "sft_72b", "sft_05b", "demo_sft"]
SFT += ["demo_long_sft", "demo_calculator_sft"]
VERIFIER = ["verifier_3b", "verifier_qwen_3b", "verifier_05b", "demo_verifier"]
CLASSES = {
    **dict.fromkeys(PPO, PPOConfig),
    **dict.fromkeys(SFT, SFTConfig),
    **dict.fromkeys(VERIFIER, VerifierTrainingConfig),
    **dict.fromkeys(["eval", "eval_7b", "eval_70b", "eval_72b", "eval_05b"], EvalConfig),
    "problems": ProblemsConfig,
    "search": SearchConfig,
}
MODELS = {
    "FreedomIntelligence/HuatuoGPT-o1-8B": "llama-8b",
    "FreedomIntelligence/HuatuoGPT-o1-7B": "qwen-7b",
    "FreedomIntelligence/HuatuoGPT-o1-70B": "llama-70b",
    "FreedomIntelligence/HuatuoGPT-o1-72B": "qwen-72b",
    "FreedomIntelligence/medical_o1_verifier_3B": "llama-3b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-8b",
    "meta-llama/Llama-3.1-70B-Instruct": "llama-70b",
    "meta-llama/Llama-3.2-3B-Instruct": "llama-3b",
    "Qwen/Qwen2.5-7B": "qwen-7b",
    "Qwen/Qwen2.5-7B-Instruct": "qwen-7b",
    "Qwen/Qwen2.5-3B-Instruct": "qwen-3b",
    "Qwen/Qwen2.5-72B-Instruct": "qwen-72b",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen-0.5b",
    "runs/sft-05b/model": "qwen-0.5b",
    "runs/verifier-05b/model": "qwen-0.5b",
    "base": "tiny",
    "DEMO/base": "tiny",
    "DEMO/sft/model": "tiny",
    "DEMO/verifier/model": "tiny",
}
"""Every model that a shipped configuration names."""
TINY = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
MACHINES = {
    "ppo_70b": "--gpus 32 --server_tp 8",
    "ppo_72b": "--gpus 32 --server_tp 8",
    "sft_70b": "--gpus 32",
    "sft_72b": "--gpus 32",
    "ppo_05b": "--gpus 1 --gpu_memory 24",
    "sft_05b": "--gpus 1 --gpu_memory 24",
    "verifier_05b": "--gpus 1 --gpu_memory 24",
    "ppo_tiny_cpu": "--gpus 1 --gpu_memory 8 --device cpu",
    "demo_ppo": "--gpus 1 --gpu_memory 8 --device cpu",
    "demo_sft": "--gpus 1 --gpu_memory 8 --device cpu",
    "demo_verifier": "--gpus 1 --gpu_memory 8 --device cpu",
}
MACHINES |= {
    f"demo_{task}_{stage}": MACHINES["demo_ppo"]
    for task in ("long", "calculator")
    for stage in ("sft", "ppo")
}
"""The machine that a configuration is made for, where it is not 8 GPUs of 80 GiB."""


def read(name: str, config_class: type) -> object:
    return parse(config_class, ["--config", str(CONFIGS / f"{name}.yaml")], program="verippo")[0]


def test_every_shipped_configuration_parses() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(CLASSES)
    for name, config_class in CLASSES.items():
        read(name, config_class)


@pytest.fixture(scope="module")
def model_configs(
    tmp_path_factory: pytest.TempPathFactory, published_models: dict[str, dict[str, Any]]
) -> Path:
    """A folder with config.json files of all models, by name."""
    folder = tmp_path_factory.mktemp("models")
    for name, sizes in MODELS.items():
        config = TINY if sizes == "tiny" else published_models[sizes]
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", [*PPO, *SFT, *VERIFIER])
def test_every_training_configuration_fits_its_machine(
    name: str, model_configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = MACHINES.get(name, "").split()
    folder = ["--model_configs", str(model_configs)]
    main(["plan", "--config", str(CONFIGS / f"{name}.yaml"), *machine, *folder])
    text = capsys.readouterr().out
    assert "\nfits: " in text, text


def test_sizes_shipped_for_hub_ids_are_the_published_ones(
    published_models: dict[str, dict[str, Any]],
) -> None:
    for name in MODELS:
        if name in yaml.safe_load(ARCHITECTURES.read_text()):
            own = model_shape(find_config(name), "x")
            published = dict(published_models[MODELS[name]])
            kind = published.pop("model_type")
            assert own == model_shape(AutoConfig.for_model(kind, **published), "x"), name


def test_commands_of_the_interface_exist() -> None:
    names = "problems search sft verifier ppo critic eval bench demo".split()  # noqa: SIM905
    serve = ["serve start", "serve status", "serve stop"]
    extended = [
        f"{command} {name}" for command in ("plan", "doctor") for name in ("ppo", "sft", "verifier")
    ]
    assert set(COMMANDS) == {*names, *serve, *extended, "eval compare"}


def test_ppo_8b_paper_holds_the_papers_numbers() -> None:
    config = read("ppo_8b_paper", PPOConfig)
    assert isinstance(config, PPOConfig)
    assert (config.episodes, config.rollouts_per_step, config.total_steps) == (20_000, 128, 157)
    assert (config.epochs, config.minibatches, config.gamma, config.lam) == (3, 1, 1.0, 0.95)
    assert (config.clip_low, config.clip_high, config.value_clip) == (0.2, 0.2, 0.2)
    assert (config.kl.coef, config.policy_learning_rate, config.warmup_ratio) == (0.03, 5e-7, 0.05)
    assert (config.sampling.temperature, config.sampling.max_new_tokens) == (0.5, 1300)
    verifier = config.verifier
    assert verifier.threshold == 0.4
    assert (verifier.right, verifier.wrong, verifier.unparsable) == (1.0, 0.1, 0.0)
    assert (config.eval_every, config.save_every) == (20, 20)
    assert (config.zero_stage, config.dtype) == (3, "bf16")


def test_ppo_8b_differs_from_the_papers_in_lambda_alone() -> None:
    paper = asdict(read("ppo_8b_paper", PPOConfig))  # type: ignore[call-overload]
    ours = asdict(read("ppo_8b", PPOConfig))  # type: ignore[call-overload]
    differing = {name: (paper[name], ours[name]) for name in paper if paper[name] != ours[name]}
    assert differing == {"lam": (0.95, 1.0)}


def test_sft_8b_holds_the_papers_numbers() -> None:
    config = read("sft_8b", SFTConfig)
    assert isinstance(config, SFTConfig)
    assert (config.epochs, config.batch_size) == (3, 128)
    assert (config.learning_rate, config.max_seq_len) == (5e-6, 8192)
    assert (config.schedule, config.warmup_ratio, config.weight_decay) == ("cosine", 0.05, 0.1)


def test_eval_holds_the_published_evaluations_numbers() -> None:
    config = read("eval", EvalConfig)
    assert isinstance(config, EvalConfig)
    assert (config.temperature, config.nucleus) == (0.5, 0.9)
    assert (config.max_new_tokens, config.endpoint) == (2000, "completions")


def test_problems_and_search_hold_the_papers_numbers() -> None:
    problems = read("problems", ProblemsConfig)
    search = read("search", SearchConfig)
    assert isinstance(problems, ProblemsConfig)
    assert isinstance(search, SearchConfig)
    assert len(problems.difficulty.models) == 3
    assert problems.split == 0.5
    assert problems.mix.choice_ratio == 4_000 / 20_000
    assert problems.mix.general_ratio == 5_000 / 20_000
    assert (search.max_depth, search.max_attempts, search.label_guided) == (3, 3, False)
