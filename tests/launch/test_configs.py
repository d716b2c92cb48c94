"""The shipped configurations parse and hold the paper's numbers (arXiv 2412.18925)."""

from __future__ import annotations

from pathlib import Path

from verippo.eval.config import EvalConfig
from verippo.launch.cli import parse
from verippo.launch.commands import COMMANDS
from verippo.rl.config import PPOConfig
from verippo.search.config import ProblemsConfig, SearchConfig
from verippo.sft.config import SFTConfig, VerifierTrainingConfig

CONFIGS = Path(__file__).resolve().parents[2] / "launch" / "configs"


def read(name: str, config_class: type) -> object:
    return parse(config_class, ["--config", str(CONFIGS / f"{name}.yaml")], program="verippo")[0]


def test_every_shipped_configuration_parses() -> None:
    classes = {
        "ppo_8b": PPOConfig,
        "ppo_tiny_cpu": PPOConfig,
        "sft_8b": SFTConfig,
        "verifier_3b": VerifierTrainingConfig,
        "demo_sft": SFTConfig,
        "demo_verifier": VerifierTrainingConfig,
        "demo_ppo": PPOConfig,
        "demo_long_sft": SFTConfig,
        "demo_long_ppo": PPOConfig,
        "eval": EvalConfig,
        "problems": ProblemsConfig,
        "search": SearchConfig,
    }
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(classes)
    for name, config_class in classes.items():
        read(name, config_class)


def test_commands_of_the_interface_exist() -> None:
    names = "problems search sft verifier ppo eval bench demo".split()  # noqa: SIM905
    serve = ["serve start", "serve status", "serve stop"]
    doctor = ["doctor ppo", "doctor sft", "doctor verifier"]
    assert set(COMMANDS) == {*names, *serve, *doctor, "eval compare"}


def test_ppo_8b_holds_the_papers_numbers() -> None:
    config = read("ppo_8b", PPOConfig)
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
