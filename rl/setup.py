"""Loads and checks everything that a PPO run needs, once, before the first step."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..core.sampling.local_sampler import LocalSampler, check_sampling, load_sampler
from ..core.sampling.process_sampler import ProcessSampler
from ..core.sampling.sampler import Sampler
from ..core.sampling.sglang_sampler import SglangSampler
from ..core.text.data import Order, Problem, load_problems, split
from ..core.text.stop_tokens import stop_token_ids
from ..core.text.verifier_text import Tiers, load_template
from ..core.training import dist
from ..core.training.engine import FrozenEngine, TrainEngine, weight_shapes
from ..core.training.pretrained import (
    check_embedding,
    check_same_vocabulary,
    context_length,
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
        drawn: Mapping[int, int] = MappingProxyType({}),
    ) -> list[RolloutPrompt]:
        """The prompts of some problems, with their seeds; see `rollout_prompts`."""
        problems = [self.problems[n] for n in numbers]
        ids = [self.token_ids[n] for n in numbers]
        return rollout_prompts(
            problems,
            ids,
            seed=seed,
            step=step,
            samples=samples,
            drawn=drawn,
        )


class Rate(Protocol):
    """A learning-rate schedule; `total_steps` replaces the planned number of optimizer steps."""

    def __call__(self, step: int, *, total_steps: int = ...) -> float: ...


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
    policy_rate: Rate
    """Optimizer step of the policy, the first being 0 -> learning rate."""
    critic_rate: Rate
    gate: dict[str, Any] = field(default_factory=dict)
    """Log-probs in the parity gate of the last weight update, by copy of the weights."""


def set_up(config: PPOConfig) -> Components:
    """Loads and checks everything.

    Raises:
        ValueError: models, data and settings do not fit together.
    """
    check_divides(config, dist.world_size())
    critic_path = config.critic_path
    reference_path = config.reference or config.policy
    others = {critic_path, reference_path, config.baseline or config.policy}
    for other in others - {config.policy}:
        check_same_vocabulary(config.policy, other)
    tokenizer = load_tokenizer(config.policy)
    train_set, eval_set = problem_sets(config, tokenizer)
    verifier = _verifier(config)
    stops = stop_token_ids(config.policy, tokenizer)
    sampler = _sampler(config, tokenizer, stops)
    critic = _critic(config, tokenizer)
    policy = load_policy(config.policy, dtype=config.dtype)
    reference = load_policy(reference_path, dtype=config.dtype)
    if config.reference_refresh_steps:
        check_same_shapes(
            policy,
            reference,
            f"reference {reference_path}",
            needed_by="reference_refresh_steps",
        )
    rollout_function: RolloutFunction = rollout
    if config.rollout_function:
        function = load_function(config.rollout_function, option="rollout_function")
        name = f"rollout_function={config.rollout_function}"
        rollout_function = functools.partial(checked_rollout, function, name)
    return Components(
        policy=TrainEngine(policy, config.engine),
        critic=critic,
        reference=FrozenEngine(reference, config.engine),
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


def check_divides(config: PPOConfig, ranks: int) -> None:
    """Checks that the rollouts of a step divide over the ranks.

    Raises:
        ValueError: they do not.
    """
    if config.rollouts_per_step % ranks:
        raise ValueError(
            f"{config.rollouts_per_step} rollouts a step (prompts_per_step x samples_per_prompt) "
            f"do not divide over {ranks} ranks: choose a multiple"
        )


def check_same_shapes(policy: Any, other: Any, name: str, *, needed_by: str) -> None:
    """Checks that the policy's weights fit into another model's, or the other way round.

    Raises:
        ValueError: a weight is missing in one of them, or differs in shape.
    """
    if differing := sorted(weight_shapes(policy).items() ^ weight_shapes(other).items()):
        raise ValueError(
            f"{name}: its weight {differing[0][0]} is not of the policy's shape: {needed_by} "
            "needs models of the same architecture"
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


def _schedule(config: PPOConfig, peak: float, total_steps: int) -> Rate:
    return functools.partial(
        learning_rate,
        peak=peak,
        total_steps=total_steps,
        warmup_ratio=config.warmup_ratio,
        kind=config.schedule,
    )


def problem_sets(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[ProblemSet, ProblemSet]:
    """The problems to train on and those held out, without over-long ones.

    Raises:
        ValueError: a row cannot be used, or too few are left for a step.
    """
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


def _critic(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> TrainEngine | NoCritic:
    if config.advantage != "gae":
        return NoCritic()
    head = "fresh" if config.critic == "verifier" else config.critic_head
    module = load_critic(
        config.critic_path,
        dtype=config.dtype,
        head=head,
        freeze=config.critic_freeze,
    )
    check_embedding(module.hf.config, tokenizer, config.critic_path)
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
    context = check_context(config, model)
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
            progress=dist.is_main() and not config.staleness,
        )
    if config.staleness:
        check_sampling(model, config.policy)
        return ProcessSampler(config.policy, **_local_options(config, stops))
    return local_sampler(config, config.policy, stops)


def check_context(config: PPOConfig, model: PretrainedConfig) -> int | None:
    """Checks that the longest prompt and response fit into the policy's context.

    Returns:
        The policy's context in tokens, if its configuration says.

    Raises:
        ValueError: they do not fit.
    """
    context = context_length(model)
    longest = config.max_prompt_tokens + config.sampling.max_new_tokens
    if context and longest > context:
        raise ValueError(
            f"max_prompt_tokens + sampling.max_new_tokens = {longest}, over the context of "
            f"{config.policy} ({context}): lower one of them"
        )
    return context


def local_sampler(config: PPOConfig, path: str, stops: tuple[int, ...]) -> LocalSampler:
    """Loads a model into a sampler of this process.

    Args:
        config: dtype and batch size.
        path: the model.
        stops: ids that end a response.

    Raises:
        ValueError: the model cannot be loaded, or its samples would not be transformers' own.
    """
    check_sampling(load_config(path), path)
    return load_sampler(path, **_local_options(config, stops), progress=dist.is_main())


def _local_options(config: PPOConfig, stops: tuple[int, ...]) -> dict[str, Any]:
    return {
        "dtype": config.dtype,
        "device": dist.device(),
        "stop_token_ids": stops,
        "max_batch": config.sampler.max_batch,
    }
