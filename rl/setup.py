"""Everything a PPO run stands on, made and checked once before the first step."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..core.sampling.local_sampler import LocalSampler
from ..core.sampling.sampler import Sampler
from ..core.sampling.sglang_sampler import SglangSampler
from ..core.text.data import Order, Problem, load_problems, split
from ..core.text.verifier_text import Tiers, load_template
from ..core.training import dist
from ..core.training.engine import FrozenEngine, TrainEngine
from ..core.training.metrics import MetricLog, start_log
from ..core.training.model import (
    check_embedding,
    check_same_vocabulary,
    context_length,
    load_causal_lm,
    load_config,
    load_critic,
    load_policy,
    load_tokenizer,
    stop_token_ids,
)
from ..core.training.schedule import learning_rate
from .advantages import AdvantageFunction, NoCritic, advantage_function
from .config import PPOConfig
from .hooks import load_function
from .judge_verifier import share_of_limits
from .rollout import RolloutFunction, RolloutPrompt, prompt_ids, rollout, rollout_prompts
from .verifier import (
    ClassifierVerifier,
    ExactMatchVerifier,
    FunctionVerifier,
    JudgeVerifier,
    Verifier,
)


@dataclass(frozen=True, kw_only=True)
class ProblemSet:
    """Problems with their prompts' token ids, over-long ones left out."""

    problems: list[Problem]
    token_ids: list[list[int]]
    dropped: list[int]
    """row numbers of the problems whose prompt is over the limit"""

    def prompts(
        self, numbers: list[int], *, seed: int, step: int, samples: int = 1
    ) -> list[RolloutPrompt]:
        problems, ids = [self.problems[n] for n in numbers], [self.token_ids[n] for n in numbers]
        return rollout_prompts(problems, ids, seed=seed, step=step, samples=samples)


@dataclass(frozen=True, kw_only=True)
class Run:
    policy: TrainEngine
    critic: TrainEngine | NoCritic
    reference: FrozenEngine
    sampler: Sampler
    verifier: Verifier
    rollout: RolloutFunction
    advantages: AdvantageFunction
    tokenizer: PreTrainedTokenizerBase
    train_set: ProblemSet
    eval_set: ProblemSet
    order: Order
    rates: Callable[[int], tuple[float, float]]
    """optimizer step -> learning rates of policy and critic"""
    gate: dict[str, Any] = field(default_factory=dict)
    """what the last weight update's parity gate saw of each copy of the weights"""


def set_up(config: PPOConfig) -> Run:
    """Loads and checks everything. Raises ValueError for whatever the caller has to mend."""
    if config.rollouts_per_step % dist.world_size():
        raise ValueError(
            f"{config.rollouts_per_step} rollouts a step (prompts_per_step x samples_per_prompt) do not divide over "
            f"{dist.world_size()} ranks: choose a multiple"
        )
    critic_path, reference_path = config.critic or config.policy, config.reference or config.policy
    for other in {critic_path, reference_path} - {config.policy}:
        check_same_vocabulary(config.policy, other)
    tokenizer = load_tokenizer(config.policy)
    train_set, eval_set = _problem_sets(config, tokenizer)
    verifier, engine = _verifier(config), config.engine
    sampler = _sampler(config, tokenizer)
    critic: TrainEngine | NoCritic = NoCritic()
    if config.advantage == "gae":
        module = load_critic(critic_path, dtype=config.dtype)
        check_embedding(module.hf.config, tokenizer, critic_path)
        critic = TrainEngine(module, engine)
    return Run(
        policy=TrainEngine(load_policy(config.policy, dtype=config.dtype), engine),
        critic=critic,
        reference=FrozenEngine(load_policy(reference_path, dtype=config.dtype), engine),
        sampler=sampler,
        verifier=verifier,
        rollout=load_function(config.rollout_function, option="rollout_function")
        if config.rollout_function
        else rollout,
        advantages=advantage_function(config),
        tokenizer=tokenizer,
        train_set=train_set,
        eval_set=eval_set,
        order=Order(len(train_set.problems), seed=config.seed),
        rates=functools.partial(_rates, config),
    )


def _rates(config: PPOConfig, step: int) -> tuple[float, float]:
    rate = functools.partial(
        learning_rate,
        step,
        total_steps=config.optimizer_steps,
        warmup_ratio=config.warmup_ratio,
        kind=config.schedule,
    )
    return rate(peak=config.policy_learning_rate), rate(peak=config.critic_learning_rate)


def _problem_sets(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[ProblemSet, ProblemSet]:
    load = functools.partial(
        load_problems,
        limit=config.limit,
        question_key=config.question_key,
        answer_key=config.answer_key,
    )
    problems = load(config.data)
    if config.eval_data:
        train, held_out = problems, load(config.eval_data)
    else:
        train_rows, eval_rows = split(
            len(problems), fraction=config.eval_fraction, seed=config.seed
        )
        train, held_out = [problems[n] for n in train_rows], [problems[n] for n in eval_rows]
    train_set, eval_set = (_problem_set(config, tokenizer, part) for part in (train, held_out))
    if len(train_set.problems) < config.prompts_per_step:
        raise ValueError(
            f"data {config.data}: {len(train_set.problems)} problems are left to train on ({len(train_set.dropped)} over "
            f"max_prompt_tokens={config.max_prompt_tokens}, {len(held_out)} held out), prompts_per_step="
            f"{config.prompts_per_step} needs as many at least"
        )
    return train_set, eval_set


def _problem_set(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> ProblemSet:
    ids = prompt_ids(tokenizer, problems, system=config.system_prompt)
    fitting = [n for n, prompt in enumerate(ids) if len(prompt) <= config.max_prompt_tokens]
    return ProblemSet(
        problems=[problems[n] for n in fitting],
        token_ids=[ids[n] for n in fitting],
        dropped=[
            problem.index
            for problem, prompt in zip(problems, ids, strict=True)
            if len(prompt) > config.max_prompt_tokens
        ],
    )


def _check_context(config: PPOConfig, context: int | None) -> None:
    longest = config.max_prompt_tokens + config.sampling.max_new_tokens
    if context and longest > context:
        raise ValueError(
            f"max_prompt_tokens + sampling.max_new_tokens = {longest}, over the context of {config.policy} ({context}): "
            "lower one of them"
        )


def _verifier(config: PPOConfig) -> Verifier:
    options = config.verifier
    tiers = Tiers(right=options.right, wrong=options.wrong, unparsable=options.unparsable)
    if options.kind == "exact":
        return ExactMatchVerifier(tiers=tiers)
    if options.kind == "judge":
        journal = Path(config.output).expanduser() / f"judge-journal-{dist.rank()}.jsonl"
        return JudgeVerifier(
            share_of_limits(config.llm, dist.world_size()), journal=journal, tiers=tiers
        )
    if options.kind == "function":
        assert options.function
        return FunctionVerifier(load_function(options.function, option="verifier.function"))
    assert options.model
    return ClassifierVerifier.load(
        options.model,
        config.engine,
        threshold=options.threshold,
        tiers=tiers,
        template=load_template(options.template),
        max_tokens=options.max_tokens,
        max_tokens_per_gpu=max(config.max_tokens_per_gpu, options.max_tokens),
    )


def open_log(
    config: PPOConfig,
    run: Run,
    folder: Path,
    *,
    step: int,
    run_id: str | None,
    resolved: dict[str, Any],
) -> MetricLog | None:
    """On the main rank: says what was dropped and starts the log."""
    if not dist.is_main():
        return None
    for part, problems in (("training", run.train_set), ("evaluation", run.eval_set)):
        if problems.dropped:
            rows = ", ".join(map(str, problems.dropped[:20])) + (
                " ..." if len(problems.dropped) > 20 else ""
            )
            limit = f"max_prompt_tokens={config.max_prompt_tokens}"
            print(f"dropped {len(problems.dropped)} {part} problems over {limit}: rows {rows}")
    calibration = Path(config.verifier.model or "") / "calibration.json"
    if (
        config.verifier.kind == "classifier" and calibration.exists()
    ):  # the report shows it beside the reward curve
        shutil.copy(calibration, folder)
    return start_log(
        folder,
        log_to=config.log_to,
        step=step,
        total_steps=config.total_steps,
        config=resolved,
        world_size=dist.world_size(),
        run_id=run_id,
    )


def _sampler(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> Sampler:
    model = load_config(config.policy)
    check_embedding(model, tokenizer, config.policy)
    _check_context(config, context_length(model))
    stops = stop_token_ids(config.policy, tokenizer)
    if config.sampler.kind == "factory":
        assert config.sampler.factory
        return load_function(config.sampler.factory, option="sampler.factory")(config.policy, stops)
    if config.sampler.kind == "sglang":
        return SglangSampler(
            config.sampler,
            stop_token_ids=stops,
            vocabulary=model.vocab_size,
            context=context_length(model),
            folder=Path(config.output) / "sync",
            progress=dist.is_main(),
        )
    hf: Any = load_causal_lm(config.policy, dtype=config.dtype)
    on_device = hf.to(dist.device(), torch.bfloat16 if config.dtype == "bf16" else torch.float32)
    return LocalSampler(
        on_device, stop_token_ids=stops, max_batch=config.sampler.max_batch, progress=dist.is_main()
    )
