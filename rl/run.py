"""A PPO run: the shared training run together with models, sampler, verifier and data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.sampling.local_sampler import LocalSampler
from ..core.sampling.sampler import SamplingParams
from ..core.sampling.sglang_sampler import SglangSampler
from ..core.training import dist
from ..core.training.metrics import peak_memory_gib
from ..core.training.pretrained import save_model
from ..core.training.run import Metrics, RunState, TrainingRun
from ..core.training.stopping import abortable
from .config import PPOConfig
from .experience import Experience, MicroBatch, MiniBatch, judged
from .rollout import Rollout, RolloutPrompt, check_rollouts, rollout
from .setup import Components, announce
from .step_metrics import UpdateMeter, evaluation_metrics, sample_row
from .weight_push import close, push_weights, sleep

NUM_LOGGED_SAMPLES = 4
"""Sampled texts written to samples.jsonl each time."""


@dataclass(kw_only=True)
class PPORun(TrainingRun[PPOConfig]):
    """The parts of a PPO run around the algorithm: sampling, scoring, metrics, checkpoints."""

    parts: Components
    evaluation: Callable[[], Metrics] | None = None
    """Scores the held-out problems; None where there are none."""
    push_metrics: Metrics = field(default_factory=dict)
    """Metrics of the last weight update of the sampler."""

    @classmethod
    def open(
        cls,
        config: PPOConfig,
        folder: Path,
        parts: Components,
        *,
        resolved: dict[str, Any],
    ) -> PPORun:
        """Resumes from the newest checkpoint, if there is one, and opens the log."""
        run = cls(
            config=config,
            folder=folder,
            parts=parts,
            engines={"policy": parts.policy, "critic": parts.critic},
            export=partial(_export, parts),
            better=lambda new, old: new["score_mean"] > old["score_mean"],
            save_when_best=True,
        )
        run.resume(resolved=resolved)
        announce(config, parts, folder)
        run.start(config.total_steps, resolved=resolved)
        parts.order.position = run.state.position
        if parts.eval_set.problems:
            run.evaluation = run._evaluate
        return run

    def begin(self) -> None:
        """Sends the weights to the sampler; at the start of a new run, evaluates once.

        If a signal stopped the run before an evaluation, makes up for it.
        """
        self.push_weights()
        if self.evaluation and self.state.step == 0:
            self.seed_draws("evaluation", 0)
            metrics = self.evaluation()
            self.log_evaluation(metrics)
            self.is_best(metrics)
        self.resume_end(self.evaluation)

    def next_prompts(self, step: int) -> list[RolloutPrompt]:
        """The prompts of a step, the same on every rank."""
        config = self.config
        numbers = self.parts.order.take(config.prompts_per_step)
        return self.parts.train_set.prompts(
            numbers,
            seed=config.seed,
            step=step,
            samples=config.samples_per_prompt,
        )

    def roll_out(self, prompts: Sequence[RolloutPrompt]) -> list[Rollout]:
        """Samples the responses of a step; afterwards the sampler may release its memory."""
        rollouts = self._roll_out(prompts, self.config.sampling)
        sleep(self.config, self.parts.sampler)
        return rollouts

    def score(self, rollouts: Sequence[Rollout]) -> Tensor:
        """The verifier's scores: [rollouts] float64, the same on every rank; NaN: no verdict."""
        scores = score(self.parts, rollouts)
        self.stop_if_asked()
        return scores

    def judged(self, rollouts: Sequence[Rollout], scores: Tensor) -> tuple[list[Rollout], Tensor]:
        """The rollouts that can be trained on, and their scores; see `experience.judged`."""
        config = self.config
        compares = config.advantage != "gae" and not config.advantage_function
        return judged(rollouts, scores, grouped=compares and config.samples_per_prompt > 1)

    @property
    def kl_coef(self) -> float:
        """Coefficient of the KL divergence, which adapts if there is a target."""
        return self.state.extra.get("kl_coef", self.config.kl.coef)

    def policy_minibatches(
        self,
        experience: Experience,
        step: int,
        meter: UpdateMeter,
    ) -> Iterator[MiniBatch]:
        """The policy's mini-batches of all PPO epochs; none while the critic warms up."""
        config = self.config
        if step <= config.critic_warmup_steps:
            return
        for epoch in range(config.epochs):
            yield from self._epoch(experience, step, epoch)
            if config.target_kl and meter.take_approx_kl() > 1.5 * config.target_kl:
                return

    def critic_minibatches(self, experience: Experience, step: int) -> Iterator[MiniBatch]:
        """The critic's mini-batches of all its epochs."""
        for epoch in range(self.config.critic_epochs or self.config.epochs):
            yield from self._epoch(experience, step, epoch)

    def _epoch(
        self,
        experience: Experience,
        step: int,
        epoch: int,
    ) -> Iterator[MiniBatch]:
        num = self.config.minibatches
        for mini in experience.minibatches(num, seed=(self.config.seed, step, epoch)):
            yield replace(mini, number=epoch * num + mini.number)

    def microbatches(self, mini: MiniBatch, meter: UpdateMeter) -> Iterator[MicroBatch]:
        """This rank's micro-batches. Until a weight has moved, a signal abandons the step."""
        for micro in mini.microbatches(self.config.max_tokens_per_gpu):
            if not meter.policy_results and not meter.critic_results:
                self.stop_if_asked()
            yield micro

    def step_policy(self, mini: MiniBatch, meter: UpdateMeter) -> None:
        """Steps the policy's optimizer."""
        config = self.config
        steps_before = self.state.step - config.critic_warmup_steps
        number = steps_before * config.epochs * config.minibatches + mini.number
        meter.policy_rate = self.parts.policy_rate(number)
        meter.policy_results.append(self.parts.policy.step(meter.policy_rate))

    def step_critic(self, mini: MiniBatch, meter: UpdateMeter) -> None:
        """Steps the critic's optimizer."""
        config = self.config
        per_step = (config.critic_epochs or config.epochs) * config.minibatches
        meter.critic_rate = self.parts.critic_rate(self.state.step * per_step + mini.number)
        meter.critic_results.append(self.parts.critic.step(meter.critic_rate))

    def end_update(
        self,
        step: int,
        meter: UpdateMeter,
        rollouts: Sequence[Rollout],
        *,
        kl: float,
    ) -> None:
        """Records the finished update: skipped steps, position in the data, and the next beta.

        Args:
            step: number of the finished step.
            meter: results of the optimizer steps.
            rollouts: saved if the run stops because of skipped steps.
            kl: KL divergence from the reference in nats per response.

        Raises:
            RuntimeError: too many optimizer steps in a row were skipped.
        """
        save_failure = partial(save_rollouts, self.folder, self.state, rollouts)
        for results in zip_longest(meter.policy_results, meter.critic_results):
            applied = all(result.applied for result in results if result)
            self.count_skipped(applied, save_failure=save_failure)
        self.state.step = step
        self.state.position = self.parts.order.position
        if target := self.config.kl.target:
            error = min(0.2, max(-0.2, kl / target - 1))
            self.state.extra["kl_coef"] = self.kl_coef * (1 + 0.1 * error)

    def push_weights(self) -> None:
        """Sends the policy's weights to the sampler, as the version of the finished step."""
        self.push_metrics = push_weights(self.config, self.parts, self.state.step)

    def record(
        self,
        row: Metrics,
        meter: UpdateMeter,
        rollouts: Sequence[Rollout],
        scores: Tensor,
    ) -> None:
        """Writes the metrics of a finished step, and at intervals sampled texts with scores."""
        config, state, verifier = self.config, self.state, self.parts.verifier
        seconds = self.watch.take()
        row |= meter.result() | seconds | self.push_metrics
        row |= {
            "episodes": state.step * config.rollouts_per_step,
            "lr_policy": meter.policy_rate,
            "lr_value": meter.critic_rate,
            "skipped_steps": state.skipped_steps,
            "verifier_inputs_cut": sum(dist.all_gather(verifier.num_cut)),
            "verifier_unjudged": sum(dist.all_gather(verifier.num_unjudged)),
            "peak_memory_gib": peak_memory_gib(),
            "tokens_per_second": row["tokens_generated"] / sum(seconds.values()),
        }
        self.log_metrics(row)
        if state.step == 1 or self.is_due(config.log_samples_every):
            self._log_samples(rollouts, scores, split="train")

    def close(self) -> None:
        """Releases the sampler and closes the log."""
        close(self.parts.sampler)
        super().close()

    def _roll_out(
        self, prompts: Sequence[RolloutPrompt], sampling: SamplingParams
    ) -> list[Rollout]:
        return roll_out(
            self.parts,
            prompts,
            sampling,
            version=self.state.step,
            stop_if_asked=self.stop_if_asked,
        )

    def _evaluate(self) -> Metrics:
        """Scores the held-out problems."""
        config, held_out = self.config, self.parts.eval_set
        numbers = list(range(len(held_out.problems)))
        prompts = held_out.prompts(numbers, seed=config.seed, step=-1)
        sampling = replace(config.sampling, temperature=config.eval_temperature)
        rollouts = self._roll_out(prompts, sampling)
        scores = self.score(rollouts)
        self._log_samples(rollouts, scores, split="eval")
        return evaluation_metrics(
            *judged(rollouts, scores, grouped=False),
            config.verifier.right,
            needs_format=self.parts.verifier.needs_format,
        )

    def _log_samples(
        self,
        rollouts: Sequence[Rollout],
        scores: Tensor,
        *,
        split: str,
    ) -> None:
        if self.log is None:
            return
        first = list(zip(rollouts, scores.tolist(), strict=True))[:NUM_LOGGED_SAMPLES]
        for sampled, value in first:
            row = sample_row(
                sampled,
                value,
                self.config.verifier,
                needs_format=self.parts.verifier.needs_format,
                step=self.state.step,
                split=split,
            )
            self.log.write_text("samples", row)


def roll_out(
    parts: Components,
    prompts: Sequence[RolloutPrompt],
    sampling: SamplingParams,
    *,
    version: int,
    stop_if_asked: Callable[[], None] = lambda: None,
) -> list[Rollout]:
    """Samples one response per prompt, each rank its share.

    Args:
        parts: sampler and rollout function.
        prompts: the prompts of all ranks.
        sampling: temperature and length limit.
        version: version of the weights.
        stop_if_asked: called by every rank after its share, which a signal may have cut short.

    Returns:
        The rollouts of all ranks in the order of the prompts, the same on every rank.

    Raises:
        ValueError: the rollout function returned another number of rollouts, or rollouts that
            cannot be trained on.
        RuntimeError: a rollout was sampled with other weights than `version`.
    """
    rank = dist.rank()
    world = dist.world_size()
    share = prompts[rank::world]
    call = partial(parts.rollout, parts.sampler, share, sampling, tokenizer=parts.tokenizer)
    # a user's function may hold collectives, which no rank may leave alone
    ours = parts.rollout is rollout and isinstance(parts.sampler, (LocalSampler, SglangSampler))
    own = abortable(call) if ours else call()
    stop_if_asked()
    assert own is not None  # only a signal ends the call
    if len(own) != len(share):
        raise ValueError(
            f"the rollout function returned {len(own)} rollouts for {len(share)} prompts: "
            "it must return one for each"
        )
    shares = dist.all_gather(own)
    rollouts = [shares[n % world][n // world] for n in range(len(prompts))]
    vocabulary = parts.policy.module.hf.config.vocab_size
    check_rollouts(rollouts, vocabulary=vocabulary, version=version)
    return rollouts


def score(parts: Components, rollouts: Sequence[Rollout]) -> Tensor:
    """The verifier's scores, each rank computing its share: [rollouts] float64 on every rank."""
    rank = dist.rank()
    world = dist.world_size()
    shares = dist.all_gather(parts.verifier.score(rollouts[rank::world]))
    scores = [shares[n % world][n // world] for n in range(len(rollouts))]
    return torch.tensor(scores, dtype=torch.float64)


def save_rollouts(folder: Path, state: RunState, rollouts: Sequence[Rollout]) -> str:
    """Writes the rollouts of a step whose update failed; returns the file's path."""
    file = folder / f"rollouts-step-{state.step + 1}.json"
    if dist.is_main():
        rows = [vars(rollout) | {"problem": vars(rollout.problem)} for rollout in rollouts]
        file.write_text(json.dumps(rows))
    return str(file)


def _export(parts: Components, folder: Path) -> None:
    save_model(
        folder,
        parts.policy.module.hf,
        parts.policy.named_tensors(),
        parts.tokenizer,
        stop_token_ids=parts.stop_token_ids,
    )
