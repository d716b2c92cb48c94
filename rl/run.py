"""A PPO run: the shared training run together with models, sampler, verifier and data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.sampling.sampler import SamplingParams
from ..core.training import dist
from ..core.training.metrics import peak_memory_gib
from ..core.training.pretrained import save_model
from ..core.training.run import Metrics, RunState, TrainingRun
from .config import PPOConfig
from .experience import judged
from .rollout import Rollout, RolloutPrompt, check_rollouts
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
        """Sends the weights to the sampler; at the start of a new run, evaluates once."""
        self.push_weights()
        if self.evaluation and self.state.step == 0:
            metrics = self.evaluation()
            self.log_evaluation(metrics)
            self.is_best(metrics)

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
        rollouts = roll_out(self.parts, prompts, self.config.sampling, version=self.state.step)
        sleep(self.config, self.parts.sampler)
        return rollouts

    def score(self, rollouts: Sequence[Rollout]) -> Tensor:
        """The verifier's scores: [rollouts] float64, the same on every rank; NaN: no verdict."""
        return score(self.parts, rollouts)

    def judged(self, rollouts: Sequence[Rollout], scores: Tensor) -> tuple[list[Rollout], Tensor]:
        """The rollouts that can be trained on, and their scores; see `experience.judged`."""
        config = self.config
        compares = config.advantage != "gae" and not config.advantage_function
        return judged(rollouts, scores, grouped=compares and config.samples_per_prompt > 1)

    def step_optimizers(
        self,
        number: int,
        meter: UpdateMeter,
        rollouts: list[Rollout],
    ) -> None:
        """Steps both optimizers; `number` counts this step's mini-batches from 0."""
        per_step = self.config.epochs * self.config.minibatches
        meter.rates = self.parts.rates(self.state.step * per_step + number)
        policy = self.parts.policy.step(meter.rates[0])
        critic = self.parts.critic.step(meter.rates[1])
        meter.add_step(policy, critic)
        save_failure = partial(save_rollouts, self.folder, self.state, rollouts)
        self.count_skipped(policy.applied and critic.applied, save_failure=save_failure)

    def end_update(self, step: int) -> None:
        """Records the finished update: the step, and the position in the data."""
        self.state.step = step
        self.state.position = self.parts.order.position

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
            "lr_policy": meter.rates[0],
            "lr_value": meter.rates[1],
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

    def _evaluate(self) -> Metrics:
        """Scores the held-out problems."""
        config, held_out = self.config, self.parts.eval_set
        numbers = list(range(len(held_out.problems)))
        prompts = held_out.prompts(numbers, seed=config.seed, step=-1)
        sampling = replace(config.sampling, temperature=config.eval_temperature)
        rollouts = roll_out(self.parts, prompts, sampling, version=self.state.step)
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
        for rollout, value in first:
            row = sample_row(
                rollout,
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
) -> list[Rollout]:
    """Samples one response per prompt, each rank its share.

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
    own = parts.rollout(parts.sampler, share, sampling, tokenizer=parts.tokenizer)
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
    weights = parts.policy.full_state()
    if dist.is_main():
        save_model(
            folder,
            parts.policy.module.hf,
            weights,
            parts.tokenizer,
            stop_token_ids=parts.stop_token_ids,
        )
