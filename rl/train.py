"""PPO with a critic and a frozen verifier: the loop, top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.report.run_report import try_report
from ..core.training import checkpoint, dist
from ..core.training.packing import pack
from ..core.training.run import Metrics, print_next_commands
from . import ppo
from .advantages import length_penalties, loss_divisor, loss_weights
from .config import PPOConfig
from .experience import Experience, compute
from .rollout import Rollout
from .run import PPORun
from .setup import set_up
from .step_metrics import UpdateMeter, check_logprob_gap, quarter_metrics, step_metrics
from .weight_push import close


def train(config: PPOConfig, *, resolved: dict[str, Any]) -> Path:
    """Runs PPO to its end, resuming from the newest checkpoint if there is one.

    Args:
        config: the run's configuration.
        resolved: the configuration as plain values, written to config.yaml.

    Returns:
        The output folder.

    Raises:
        ValueError: configuration, data or models are invalid or do not fit together.
        RuntimeError: the run failed, such as by consecutive steps with non-finite gradients.
    """
    dist.init(
        timeout_seconds=config.timeout_seconds,
        heartbeat_seconds=config.heartbeat_seconds,
    )
    with dist.fail_together():
        folder = checkpoint.prepare_output(config.output, resume=config.resume)
        parts = set_up(config)
        try:
            run = PPORun.open(config, folder, parts, resolved=resolved)
        except BaseException:
            close(parts.sampler)
            raise
        try:
            with run.saved_on_stop():
                _loop(config, run)
            run.finish()
        finally:
            run.close()
            if dist.is_main():
                try_report(folder, title="PPO run")
        print_next_commands(
            folder,
            "verippo eval --engine local --model MODEL --data test.json --output runs/eval",
        )
        return folder


def _loop(config: PPOConfig, run: PPORun) -> None:
    policy = run.parts.policy
    critic = run.parts.critic
    policy_loss = run.parts.policy_loss
    temperature = config.sampling.temperature
    outputs = partial(policy, temperature=temperature, with_entropy=config.entropy_coef > 0)
    run.begin()
    for step, bar in run.steps("ppo"):
        with run.watch("rollout"):
            rollouts = run.rollouts.take(step)
        with run.watch("score"):
            scores = run.score(rollouts)  # [rollouts], NaN without a verdict; equal on all ranks
        rollouts, scores = run.refilled(step, rollouts, scores)
        with run.watch("forward"):
            experience, row = _targets(config, run, *run.judged(rollouts, scores))

        meter = UpdateMeter()
        with run.watch("train"):
            for mini in run.policy_minibatches(experience, step, meter):
                for micro in run.microbatches(mini, meter):
                    pg = policy_loss(outputs(micro.batch), micro)
                    policy.backward(pg.loss_sum, loss_divisor(config, mini), last=micro.last)
                    meter.add_policy(pg, first_minibatch=mini.number == 0)
                run.step_policy(mini, meter)
            for mini in run.critic_minibatches(experience, step):
                for micro in run.microbatches(mini, meter):
                    vf = ppo.value_loss(
                        critic(micro.batch),
                        micro.values,
                        micro.returns,
                        micro.mask,
                        clip=config.value_clip,
                    )
                    critic.backward(vf.loss_sum, mini.num_response_tokens, last=micro.last)
                    meter.add_critic(vf)
                run.step_critic(mini, meter)

        run.end_update(step, meter, rollouts, row)
        with run.watch("rollout"):
            run.rollouts.finish()  # sampling of the next step, if it runs beside this one
        with run.watch("sync"):
            run.push_weights()
            run.refresh_reference()
        run.keep_rollouts(rollouts, scores, experience)
        run.record(row, meter, rollouts, scores)
        run.end_step(run.evaluation)
        bar.set_postfix(score=f"{row['score_mean']:.3f}", kl=f"{row['kl_mean']:.2f}")


def _targets(
    config: PPOConfig,
    run: PPORun,
    rollouts: Sequence[Rollout],
    scores: Tensor,
) -> tuple[Experience, Metrics]:
    """Fixes the targets of a step before any weight moves; returns them with their metrics."""
    parts = run.parts
    batch = pack(rollouts)
    mask = batch.response_mask  # [tokens], as are all tensors below but the scores
    forward = partial(compute, batch=batch, max_tokens=config.max_tokens_per_gpu)
    at_temperature = {"temperature": config.sampling.temperature}
    logprobs, entropy = forward(partial(parts.policy, **at_temperature, with_entropy=True))
    (ref_logprobs,) = forward(partial(parts.reference, **at_temperature))
    (values,) = forward(parts.critic)

    kl_coef = run.kl_coef
    rewards = ppo.token_rewards(
        scores + length_penalties(config, rollouts),
        logprobs,
        ref_logprobs,
        mask,
        batch.cu_seqlens,
        kl_coef=kl_coef if config.kl.place == "reward" else 0.0,
        estimator=config.kl.estimator,
    )
    advantages, returns = parts.advantages(rewards, values, batch, rollouts)
    whitened = ppo.whiten(advantages, mask) if config.whiten else advantages
    weights, correction = loss_weights(config, logprobs, batch, rollouts)
    experience = Experience(
        batch=batch,
        logprobs=logprobs,
        values=values,
        advantages=torch.where(mask, whitened * weights, 0.0),
        returns=returns,
        ref_logprobs=ref_logprobs,
        rewards=rewards,
        kl_coef=kl_coef if config.kl.place == "loss" else 0.0,
    )
    metrics = step_metrics(
        rollouts=rollouts,
        scores=scores,
        rewards=rewards,
        batch=batch,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
        values=values,
        returns=returns,
        right_score=config.verifier.right,
        needs_format=parts.verifier.needs_format,
    )
    check_logprob_gap(metrics, config.max_logprob_gap, step=run.state.step + 1)
    metrics |= quarter_metrics(values, advantages, returns, batch) | correction
    return experience, metrics | {"kl_coef": kl_coef}
