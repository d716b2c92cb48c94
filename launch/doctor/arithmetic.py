"""Checks of the batches, and of the functions that a configuration names."""

from __future__ import annotations

from functools import partial

from ...core.training.run_config import RunConfig
from ...rl.advantages import advantage_function, policy_loss_function
from ...rl.config import PPOConfig
from ...rl.hooks import load_function
from ...rl.setup import check_divides
from ...sft.config import TrainingConfig
from .findings import Caution, Report


def check_batches(report: Report, config: RunConfig, *, ranks: int, num_rows: int | None) -> None:
    """Checks how batches divide, and how much work a run is.

    Args:
        report: receives the findings.
        config: the run's configuration.
        ranks: number of ranks that the run will have.
        num_rows: training rows; None where they could not be read.
    """
    report.group = "batches"
    if isinstance(config, PPOConfig):
        report.check("rollouts", partial(_rollouts, config, ranks))
        report.check("steps", partial(_ppo_steps, config, num_rows))
        report.check("tokens", partial(_ppo_tokens, config, ranks))
    elif isinstance(config, TrainingConfig):
        report.check("rows", partial(_batch, config, ranks))
        if num_rows:
            report.check("steps", partial(_steps, config, num_rows))


def check_functions(report: Report, config: RunConfig) -> None:
    """Imports the functions that a PPO configuration names."""
    if not isinstance(config, PPOConfig):
        return
    report.group = "functions"
    named = {
        "verifier.function": config.verifier.kind == "function" and config.verifier.function,
        "rollout_function": config.rollout_function,
        "sampler.factory": config.sampler.kind == "factory" and config.sampler.factory,
    }
    for option, spec in named.items():
        if spec:
            report.check(option, partial(_imported, spec, option))
    if config.advantage_function:
        report.check("advantage_function", partial(_made, config, advantage_function))
    if config.policy_loss_function:
        report.check("policy_loss_function", partial(_made, config, policy_loss_function))


def _imported(spec: str, option: str) -> str:
    load_function(spec, option=option)
    return spec


def _made(config: PPOConfig, make: object) -> str:
    assert callable(make)
    make(config)
    return "can be imported"


def _rollouts(config: PPOConfig, ranks: int) -> str:
    check_divides(config, ranks)
    each = config.rollouts_per_step // ranks
    mini = config.rollouts_per_step // config.minibatches
    text = (
        f"{config.rollouts_per_step} a step, {each} on each of {ranks} rank(s), {mini} in a "
        "mini-batch"
    )
    if mini < ranks:
        raise Caution(f"{text}: {ranks - mini} ranks have nothing to do: lower minibatches")
    return text


def _ppo_steps(config: PPOConfig, num_rows: int | None) -> str:
    text = (
        f"{config.total_steps} steps, {config.policy_steps} optimizer steps of the policy and "
        f"{config.critic_steps if config.advantage == 'gae' else 0} of the critic"
    )
    if num_rows:
        passes = config.total_steps * config.prompts_per_step / num_rows
        text += f", {passes:.2f} passes over the problems"
    return text


def _ppo_tokens(config: PPOConfig, ranks: int) -> str:
    longest = config.max_prompt_tokens + config.sampling.max_new_tokens
    total = config.rollouts_per_step * longest
    share = total // ranks
    passes = -(-share // config.max_tokens_per_gpu)
    return (
        f"at most {total:,} a step, {share:,} a rank: {passes} micro-batches of "
        f"max_tokens_per_gpu={config.max_tokens_per_gpu}"
    )


def _batch(config: TrainingConfig, ranks: int) -> str:
    tokens = config.batch_size * config.max_seq_len
    text = f"{config.batch_size} a step over {ranks} rank(s), at most {tokens:,} tokens"
    if config.batch_size < ranks:
        raise Caution(f"{text}: {ranks - config.batch_size} ranks have nothing to do")
    return text


def _steps(config: TrainingConfig, num_rows: int) -> str:
    steps = config.total_steps(num_rows)
    passes = steps * config.batch_size / num_rows if config.max_steps else config.epochs
    return f"{steps} optimizer steps, {passes:.2f} passes over the rows"
