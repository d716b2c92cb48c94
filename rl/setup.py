"""Loads and checks everything that a PPO run needs, once, before the first step."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..core.sampling.local_sampler import LocalSampler, check_sampling
from ..core.sampling.sampler import Sampler
from ..core.sampling.sglang_sampler import SglangSampler
from ..core.text.data import Order, Problem, load_problems, split
from ..core.text.stop_tokens import stop_token_ids
from ..core.text.verifier_text import Tiers, load_template
from ..core.training import dist
from ..core.training.engine import FrozenEngine, TrainEngine
from ..core.training.pretrained import (
    check_embedding,
    check_same_vocabulary,
    context_length,
    load_causal_lm,
    load_config,
    load_critic,
    load_policy,
    load_tokenizer,
)
from ..core.training.schedule import learning_rate
from .advantages import (
    AdvantageFunction,
    NoCritic,
    PolicyLossFunction,
    advantage_function,
    policy_loss_function,
)
from .config import PPOConfig
from .hooks import check_sampler, load_function
from .judge_verifier import share_of_limits
from .rollout import (
    RolloutFunction,
    RolloutPrompt,
    checked_rollout,
    prompt_ids,
    rollout,
    rollout_prompts,
)
from .verifier import (
    ClassifierVerifier,
    ExactMatchVerifier,
    FunctionVerifier,
    JudgeVerifier,
    Verifier,
)

MAX_NAMED_ROWS = 20
"""Number of dropped rows that a message names."""


@dataclass(frozen=True, kw_only=True)
class ProblemSet:
    """Problems with the token ids of their prompts, without over-long ones."""

    problems: list[Problem]
    token_ids: list[list[int]]
    dropped: list[int]
    """Row numbers of the problems whose prompt is too long."""

    def prompts(
        self,
        numbers: list[int],
        *,
        seed: int,
        step: int,
        samples: int = 1,
    ) -> list[RolloutPrompt]:
        """The prompts of some problems, `samples` for each, with the seeds of their draws."""
        problems = [self.problems[n] for n in numbers]
        ids = [self.token_ids[n] for n in numbers]
        return rollout_prompts(
            problems,
            ids,
            seed=seed,
            step=step,
            samples=samples,
        )


@dataclass(frozen=True, kw_only=True)
class Components:
    """Models, sampler, verifier, hooks and data of a PPO run."""

    policy: TrainEngine
    critic: TrainEngine | NoCritic
    reference: FrozenEngine
    sampler: Sampler
    verifier: Verifier
    rollout: RolloutFunction
    advantages: AdvantageFunction
    policy_loss: PolicyLossFunction
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    """Ids that end a response, in sampling and in the exported model."""
    train_set: ProblemSet
    eval_set: ProblemSet
    order: Order
    policy_rate: Callable[[int], float]
    """Optimizer step of the policy, the first being 0 -> learning rate."""
    critic_rate: Callable[[int], float]
    gate: dict[str, Any] = field(default_factory=dict)
    """Log-probs in the parity gate of the last weight update, by copy of the weights."""


def set_up(config: PPOConfig) -> Components:
    """Loads and checks everything.

    Raises:
        ValueError: models, data and settings do not fit together.
    """
    if config.rollouts_per_step % dist.world_size():
        raise ValueError(
            f"{config.rollouts_per_step} rollouts a step (prompts_per_step x samples_per_prompt) "
            f"do not divide over {dist.world_size()} ranks: choose a multiple"
        )
    critic_path = config.critic or config.policy
    reference_path = config.reference or config.policy
    for other in {critic_path, reference_path} - {config.policy}:
        check_same_vocabulary(config.policy, other)
    tokenizer = load_tokenizer(config.policy)
    train_set, eval_set = _problem_sets(config, tokenizer)
    verifier = _verifier(config)
    stops = stop_token_ids(config.policy, tokenizer)
    sampler = _sampler(config, tokenizer, stops)
    critic = _critic(config, critic_path, tokenizer)
    # one after another: under ZeRO-3 no rank then ever holds a whole model
    load = functools.partial(load_policy, dtype=config.dtype, engine=config.engine)
    policy = TrainEngine(load(config.policy), config.engine)
    reference = FrozenEngine(load(reference_path), config.engine)
    rollout_function: RolloutFunction = rollout
    if config.rollout_function:
        function = load_function(config.rollout_function, option="rollout_function")
        name = f"rollout_function={config.rollout_function}"
        rollout_function = functools.partial(checked_rollout, function, name)
    return Components(
        policy=policy,
        critic=critic,
        reference=reference,
        sampler=sampler,
        verifier=verifier,
        rollout=rollout_function,
        advantages=advantage_function(config),
        policy_loss=policy_loss_function(config),
        tokenizer=tokenizer,
        stop_token_ids=stops,
        train_set=train_set,
        eval_set=eval_set,
        order=Order(len(train_set.problems), seed=config.seed),
        policy_rate=_schedule(config, config.policy_learning_rate, config.policy_steps),
        critic_rate=_schedule(config, config.critic_learning_rate, config.critic_steps),
    )


def announce(config: PPOConfig, parts: Components, folder: Path) -> None:
    """Prints which problems were dropped and puts the verifier's calibration beside the log."""
    if not dist.is_main():
        return
    for name, problems in (("training", parts.train_set), ("evaluation", parts.eval_set)):
        if problems.dropped:
            rows = ", ".join(map(str, problems.dropped[:MAX_NAMED_ROWS]))
            rows += " ..." if len(problems.dropped) > MAX_NAMED_ROWS else ""
            limit = f"max_prompt_tokens={config.max_prompt_tokens}"
            print(f"dropped {len(problems.dropped)} {name} problems over {limit}: rows {rows}")
    calibration = Path(config.verifier.model or "") / "calibration.json"
    if config.verifier.kind == "classifier" and calibration.exists():
        shutil.copy(calibration, folder)


def _schedule(config: PPOConfig, peak: float, total_steps: int) -> Callable[[int], float]:
    return functools.partial(
        learning_rate,
        peak=peak,
        total_steps=total_steps,
        warmup_ratio=config.warmup_ratio,
        kind=config.schedule,
    )


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
        train = problems
        held_out = load(config.eval_data, purpose="validation")
    else:
        num, fraction = len(problems), config.eval_fraction
        train_rows, eval_rows = split(num, fraction=fraction, seed=config.seed)
        train = [problems[n] for n in train_rows]
        held_out = [problems[n] for n in eval_rows]
    train_set = _problem_set(config, tokenizer, train)
    eval_set = _problem_set(config, tokenizer, held_out)
    if len(train_set.problems) < config.prompts_per_step:
        raise ValueError(
            f"data {config.data}: {len(train_set.problems)} problems are left to train on "
            f"({len(train_set.dropped)} over max_prompt_tokens={config.max_prompt_tokens}, "
            f"{len(held_out)} held out), fewer than prompts_per_step={config.prompts_per_step}"
        )
    return train_set, eval_set


def _problem_set(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> ProblemSet:
    ids = prompt_ids(tokenizer, problems, system=config.system_prompt)
    fits = [len(prompt) <= config.max_prompt_tokens for prompt in ids]
    return ProblemSet(
        problems=[problem for problem, fit in zip(problems, fits, strict=True) if fit],
        token_ids=[prompt for prompt, fit in zip(ids, fits, strict=True) if fit],
        dropped=[problem.index for problem, fit in zip(problems, fits, strict=True) if not fit],
    )


def _critic(
    config: PPOConfig, path: str, tokenizer: PreTrainedTokenizerBase
) -> TrainEngine | NoCritic:
    if config.advantage != "gae":
        return NoCritic()
    module = load_critic(path, dtype=config.dtype, engine=config.engine)
    check_embedding(module.hf.config, tokenizer, path)
    return TrainEngine(module, config.engine)


def _verifier(config: PPOConfig) -> Verifier:
    options = config.verifier
    tiers = Tiers(
        right=options.right,
        wrong=options.wrong,
        unparsable=options.unparsable,
    )
    if options.kind == "exact":
        return ExactMatchVerifier(tiers=tiers)
    if options.kind == "judge":
        journal = Path(config.output).expanduser() / f"judge-journal-{dist.rank()}.jsonl"
        limits = share_of_limits(config.llm, dist.world_size())
        return JudgeVerifier(limits, journal=journal, seed=config.seed, tiers=tiers)
    if options.kind == "function":
        assert options.function
        function = load_function(options.function, option="verifier.function")
        return FunctionVerifier(function, name=f"verifier.function={options.function}")
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


def _sampler(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, stops: tuple[int, ...]
) -> Sampler:
    model = load_config(config.policy)
    check_embedding(model, tokenizer, config.policy)
    context = context_length(model)
    longest = config.max_prompt_tokens + config.sampling.max_new_tokens
    if context and longest > context:
        raise ValueError(
            f"max_prompt_tokens + sampling.max_new_tokens = {longest}, over the context of "
            f"{config.policy} ({context}): lower one of them"
        )
    if config.sampler.kind == "factory":
        assert config.sampler.factory
        factory = load_function(config.sampler.factory, option="sampler.factory")
        return check_sampler(factory(config.policy, stops), name=config.sampler.factory)
    if config.sampler.kind == "sglang":
        return SglangSampler(
            config.sampler,
            stop_token_ids=stops,
            vocabulary=model.vocab_size,
            context=context,
            folder=Path(config.output) / "sync",
            progress=dist.is_main(),
        )
    check_sampling(model, config.policy)
    hf: Any = load_causal_lm(config.policy, dtype=config.dtype)
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    return LocalSampler(
        hf.to(dist.device(), dtype),
        stop_token_ids=stops,
        max_batch=config.sampler.max_batch,
        progress=dist.is_main(),
    )
