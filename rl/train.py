"""PPO with a critic and a frozen verifier: the loop, top to bottom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from .advantages import importance_weights
from .config import PPOConfig
from .experience import Experience, MiniBatch, compute
from .rollout import Rollout
from .run import PPORun
from .setup import set_up
from .step_metrics import UpdateMeter, check_logprob_gap, step_metrics
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
    dist.init(timeout_seconds=config.timeout_seconds)
    with dist.fail_together():
        folder = checkpoint.prepare_output(config.output, resume=config.resume)
        parts = set_up(config)
        try:
            run = PPORun.open(config, folder, parts, resolved=resolved)
        except BaseException:
            close(parts.sampler)
            raise
        try:
            _loop(config, run)
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
    run.begin()
    for step, bar in run.steps("ppo"):
        with run.watch("rollout"):
            rollouts = run.roll_out(run.next_prompts(step))
        with run.watch("score"):
            scores = run.score(rollouts)  # [rollouts], NaN without a verdict; equal on all ranks
        with run.watch("forward"):
            experience, row = _targets(config, run, *run.judged(rollouts, scores))

        meter = UpdateMeter()
        with run.watch("train"):
            for number, mini in enumerate(_minibatches(config, experience, step)):
                for micro in mini.microbatches(config.max_tokens_per_gpu):
                    pg = policy_loss(policy(micro.batch, temperature=temperature), micro)
                    vf = ppo.value_loss(
                        critic(micro.batch),
                        micro.values,
                        micro.returns,
                        micro.mask,
                        clip=config.value_clip,
                    )
                    policy.backward(pg.loss_sum, mini.num_response_tokens, last=micro.last)
                    critic.backward(vf.loss_sum, mini.num_response_tokens, last=micro.last)
                    meter.add(pg, vf, first_minibatch=number == 0)
                run.step_optimizers(number, meter, rollouts)

        run.end_update(step)
        with run.watch("sync"):
            run.push_weights()
        run.record(row, meter, rollouts, scores)
        run.end_step(run.evaluation)
        bar.set_postfix(score=f"{row['score_mean']:.3f}", kl=f"{row['kl_mean']:.2f}")
    run.finish()


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

    truncated = torch.tensor([float(rollout.truncated) for rollout in rollouts])
    rewards = ppo.token_rewards(
        scores - config.missing_eos_penalty * truncated,
        logprobs,
        ref_logprobs,
        mask,
        batch.cu_seqlens,
        kl_coef=config.kl.coef,
        estimator=config.kl.estimator,
    )
    advantages, returns = parts.advantages(rewards, values, batch, rollouts)
    experience = Experience(
        batch=batch,
        logprobs=logprobs,
        values=values,
        advantages=ppo.whiten(advantages, mask) if config.whiten else advantages,
        returns=returns,
        importance=importance_weights(config, logprobs, batch, rollouts),
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
    return experience, metrics


def _minibatches(config: PPOConfig, experience: Experience, step: int) -> Iterator[MiniBatch]:
    """The mini-batches of all PPO epochs, freshly shuffled for each epoch."""
    for epoch in range(config.epochs):
        yield from experience.minibatches(config.minibatches, seed=(config.seed, step, epoch))
