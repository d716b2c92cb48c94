"""A PPO run: the shared training run together with models, sampler, verifier and data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.sampling.sampler import SamplingParams
from ..core.training import dist
from ..core.training.metrics import peak_memory_gib
from ..core.training.run import Metrics, Saveable, TrainingRun
from ..core.training.watchdog import enter_phase
from . import critic_warmup
from .config import PPOConfig
from .experience import Experience, MicroBatch, MiniBatch, judged
from .held_out import HeldOutRecord, evaluate_baseline, right_answers
from .refill import Sampled, refill
from .rollout import Rollout, RolloutPrompt
from .rollout_source import RolloutSource, rollout_source
from .sampling import roll_out, score
from .saving import export_policy, save_rollouts, write_samples
from .setup import Components, announce
from .step_metrics import UpdateMeter, evaluation_metrics
from .stored_rollouts import FOLDER, discard_after, stored_rows, write_step
from .weight_push import close, push_weights, sleep


@dataclass(kw_only=True)
class PPORun(TrainingRun[PPOConfig]):
    """The parts of a PPO run around the algorithm: sampling, scoring, metrics, checkpoints."""

    parts: Components
    held_out: HeldOutRecord
    """Results of the start and the baseline on the held-out problems."""
    rollouts: RolloutSource = field(init=False)
    """Where each step's rollouts come from."""
    evaluation: Callable[[], Metrics] | None = None
    """Scores the held-out problems; None where there are none."""
    push_metrics: Metrics = field(default_factory=dict)
    """Metrics of the last weight update of the sampler."""
    refill_metrics: Metrics = field(default_factory=dict)
    """Metrics of the step's dropped and refilled groups."""

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
        held_out = HeldOutRecord(num=len(parts.eval_set.problems))
        engines: dict[str, Saveable] = {
            "policy": parts.policy,
            "critic": parts.critic,
            "held_out": held_out,
        }
        if config.reference_refresh_steps:
            engines["reference"] = parts.reference
        run = cls(
            config=config,
            folder=folder,
            parts=parts,
            held_out=held_out,
            engines=engines,
            export=partial(export_policy, parts),
            better=lambda new, old: new["score_mean"] > old["score_mean"],
            save_when_best=True,
            stop_early=lambda state: config.stop_below_baseline and held_out.fell,
        )
        run.rollouts = rollout_source(
            config,
            parts,
            prompts=run.next_prompts,
            stop_if_asked=run.stop_if_asked,
        )
        run.engines = {**run.engines, "rollouts": run.rollouts}
        run.resume(resolved=resolved)
        announce(config, parts, folder)
        run.start(config.total_steps, resolved=resolved)
        parts.order.position = run.state.position
        if dist.is_main():
            discard_after(folder / FOLDER, run.state.step)
        if parts.eval_set.problems:
            run.evaluation = run._evaluate
        return run

    def begin(self) -> None:
        """Sends the weights to the sampler; at the start of a new run, evaluates once.

        A baseline that has no results yet is evaluated before. If a signal stopped the run before
        an evaluation, makes up for it.
        """
        if self.config.baseline not in (None, self.held_out.baseline_model):
            enter_phase("evaluate")
            self.seed_draws("baseline", 0)
            evaluate_baseline(
                self.config,
                self.parts,
                self.held_out,
                lambda parts: self._answer_held_out(parts, split="baseline")[1],
                version=self.state.step,
            )
        self.push_weights()
        if self.evaluation and self.state.step == 0:
            self.seed_draws("evaluation", 0)
            metrics = self.evaluation()
            self.log_evaluation(metrics)
            self.is_best(metrics)
        self.resume_end(self.evaluation)

    def next_prompts(
        self,
        step: int,
        *,
        count: int | None = None,
        drawn: Sequence[Rollout] = (),
    ) -> list[RolloutPrompt]:
        """The prompts of a step, the same on every rank.

        Args:
            step: number of the step.
            count: number of problems; None: `prompts_per_step`.
            drawn: rollouts of the step so far.
        """
        config = self.config
        numbers = self.parts.order.take(count or config.prompts_per_step)
        return self.parts.train_set.prompts(
            numbers,
            seed=config.seed,
            step=step,
            samples=config.samples_per_prompt,
            drawn=Counter(rollout.problem.index for rollout in drawn),
        )

    def score(self, rollouts: Sequence[Rollout]) -> Tensor:
        """The verifier's scores: [rollouts] float64, the same on every rank; NaN: no verdict."""
        scores = score(self.parts, rollouts)
        self.stop_if_asked()
        return scores

    def refilled(
        self,
        step: int,
        rollouts: list[Rollout],
        scores: Tensor,
    ) -> tuple[list[Rollout], Tensor]:
        """With `refill_groups`, replaces groups of equal scores by further ones; see `refill`."""
        config = self.config
        if not config.refill_groups:
            return rollouts, scores

        def sample(count: int, drawn: Sequence[Rollout]) -> Sampled:
            with self.watch("rollout"):
                if config.sampler.sleep:  # it is asleep, and a push alone wakes it
                    self.push_weights()
                prompts = self.next_prompts(step, count=count, drawn=drawn)
                more = self._sample(self.parts, prompts, config.sampling)
                sleep(config, self.parts.sampler)
            with self.watch("score"):
                return more, self.score(more)

        rollouts, scores, self.refill_metrics = refill(
            rollouts,
            scores,
            sample,
            rounds=config.refill_groups,
            samples_per_prompt=config.samples_per_prompt,
            right_score=config.verifier.right,
        )
        return rollouts, scores

    def judged(self, rollouts: Sequence[Rollout], scores: Tensor) -> tuple[list[Rollout], Tensor]:
        """The rollouts that can be trained on, and their scores; see `experience.judged`."""
        return judged(rollouts, scores, grouped=self.config.compares_samples)

    @property
    def kl_coef(self) -> float:
        """Coefficient of the KL divergence, which adapts if there is a target."""
        return self.state.extra.get("kl_coef", self.config.kl.coef)

    @property
    def warmup_steps(self) -> int:
        """Steps that train the critic alone: those planned, or fewer if the warm-up has settled."""
        return int(self.state.extra.get(critic_warmup.STEPS, self.config.critic_warmup_steps))

    def policy_minibatches(
        self,
        experience: Experience,
        step: int,
        meter: UpdateMeter,
    ) -> Iterator[MiniBatch]:
        """The policy's mini-batches of all PPO epochs; none while the critic warms up."""
        config = self.config
        if step <= self.warmup_steps:
            return
        for epoch in range(config.epochs):
            yield from experience.epoch(epoch, config.minibatches, seed=(config.seed, step))
            if config.target_kl and meter.take_approx_kl() > 1.5 * config.target_kl:
                return

    def critic_minibatches(self, experience: Experience, step: int) -> Iterator[MiniBatch]:
        """The critic's mini-batches of all its epochs."""
        config = self.config
        for epoch in range(config.critic_epochs or config.epochs):
            yield from experience.epoch(epoch, config.minibatches, seed=(config.seed, step))

    def microbatches(self, mini: MiniBatch, meter: UpdateMeter) -> Iterator[MicroBatch]:
        """This rank's micro-batches. Until a weight has moved, a signal abandons the step."""
        for micro in mini.microbatches(self.config.max_tokens_per_gpu):
            if not meter.policy_results and not meter.critic_results:
                self.stop_if_asked()
            yield micro

    def step_policy(self, mini: MiniBatch, meter: UpdateMeter) -> None:
        """Steps the policy's optimizer."""
        config = self.config
        per_step = config.epochs * config.minibatches
        number = (self.state.step - self.warmup_steps) * per_step + mini.number
        total = (config.total_steps - self.warmup_steps) * per_step
        meter.policy_rate = self.parts.policy_rate(number, total_steps=total)
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
        row: Metrics,
    ) -> None:
        """Records the finished update: skipped steps, position, next beta, the warm-up's progress.

        Args:
            step: number of the finished step.
            meter: results of the optimizer steps.
            rollouts: saved if the run stops because of skipped steps.
            row: metrics of the step's targets.

        Raises:
            RuntimeError: too many optimizer steps in a row were skipped.
        """
        save_failure = partial(save_rollouts, self.folder, self.state, rollouts)
        for results in zip_longest(meter.policy_results, meter.critic_results):
            applied = all(result.applied for result in results if result)
            self.count_skipped(applied, save_failure=save_failure)
        self.state.step = step
        self.state.position = self.parts.order.position
        if self.refill_metrics:
            more = self.refill_metrics["responses_sampled"] - self.config.rollouts_per_step
            self.state.extra["refills"] = self.state.extra.get("refills", 0) + more
        if target := self.config.kl.target:
            error = min(0.2, max(-0.2, row["kl_mean"] / target - 1))
            self.state.extra["kl_coef"] = self.kl_coef * (1 + 0.1 * error)
        patience = self.config.critic_warmup_settled
        if patience and step <= self.warmup_steps:
            explained = row["explained_variance"]
            self.state.extra |= critic_warmup.follow_warmup(
                self.state.extra, step=step, explained_variance=explained, patience=patience
            )

    def push_weights(self) -> None:
        """Sends the policy's weights to the sampler, as the version of the finished step."""
        self.push_metrics = push_weights(self.config, self.parts, self.state.step)

    def refresh_reference(self) -> None:
        """With `reference_refresh_steps`, copies the policy's weights to the reference when due."""
        every = self.config.reference_refresh_steps
        if every and self.state.step % every == 0:
            self.parts.reference.copy_weights(self.parts.policy.named_tensors())

    def keep_rollouts(
        self,
        rollouts: Sequence[Rollout],
        scores: Tensor,
        experience: Experience,
    ) -> None:
        """Writes the rollouts of the finished step, if the run keeps them."""
        if self.config.keep_rollouts and dist.is_main():
            trained, _ = self.judged(rollouts, scores)
            rows = stored_rows(rollouts, scores, trained, experience)
            write_step(self.folder / FOLDER, self.state.step, rows)

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
        row |= meter.result() | seconds | self.push_metrics | self.refill_metrics
        num_tokens = row.get("tokens_sampled") or row["tokens_generated"]
        row |= {
            "rollout_staleness": state.step - 1 - rollouts[0].version,
            "episodes": state.step * config.rollouts_per_step + state.extra.get("refills", 0),
            "lr_policy": meter.policy_rate,
            "lr_value": meter.critic_rate,
            "skipped_steps": state.skipped_steps,
            "verifier_inputs_cut": sum(dist.all_gather(verifier.num_cut)),
            "verifier_unjudged": sum(dist.all_gather(verifier.num_unjudged)),
            "peak_memory_gib": peak_memory_gib(),
            "tokens_per_second": num_tokens / sum(seconds.values()),
        }
        if every := config.reference_refresh_steps:
            row["reference_step"] = (state.step - 1) // every * every
        self.log_metrics(row)
        if state.step == 1 or self.is_due(config.log_samples_every):
            self._log_samples(rollouts, scores, split="train")

    def finish(self) -> None:
        """Exports the final model.

        Raises:
            RuntimeError: `stop_below_baseline` ended the run.
        """
        super().finish()
        if self.stop_early(self.state):
            raise RuntimeError(
                f"step {self.state.step}: stop_below_baseline ended the run, because its held-out "
                "rate is significantly below the start's or the baseline's (see the warning above)"
            )

    def close(self) -> None:
        """Ends sampling, releases the sampler and closes the log."""
        self.rollouts.close()
        close(self.parts.sampler)
        super().close()

    def _evaluate(self) -> Metrics:
        """Scores the held-out problems."""
        right_score = self.config.verifier.right
        rollouts, scores = self._answer_held_out(self.parts, split="eval")
        metrics = evaluation_metrics(
            *judged(rollouts, scores, grouped=False),
            right_score,
            needs_format=self.parts.verifier.needs_format,
        )
        results = right_answers(scores, right_score)
        return metrics | self.held_out.compare(results, step=self.state.step)

    def _answer_held_out(self, parts: Components, *, split: str) -> tuple[list[Rollout], Tensor]:
        """Responses to the held-out problems, and their scores."""
        config, held_out = self.config, parts.eval_set
        numbers = list(range(len(held_out.problems)))
        prompts = held_out.prompts(numbers, seed=config.seed, step=-1)
        sampling = replace(config.sampling, temperature=config.eval_temperature)
        rollouts = self._sample(parts, prompts, sampling)
        scores = self.score(rollouts)
        self._log_samples(rollouts, scores, split=split)
        return rollouts, scores

    def _sample(
        self, parts: Components, prompts: Sequence[RolloutPrompt], sampling: SamplingParams
    ) -> list[Rollout]:
        return roll_out(
            parts,
            prompts,
            sampling,
            version=self.state.step,
            stop_if_asked=self.stop_if_asked,
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
        write_samples(
            self.log,
            rollouts,
            scores,
            self.config.verifier,
            needs_format=self.parts.verifier.needs_format,
            step=self.state.step,
            split=split,
        )
