"""PPO with a frozen verifier: the loop, top to bottom."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..core.report.run_report import try_report
from ..core.sampling.sampler import SamplingParams
from ..core.training import checkpoint, dist
from ..core.training.metrics import MetricLog, Stopwatch, finite
from ..core.training.model import save_model
from ..core.training.packing import pack
from . import ppo
from . import weight_push as sync
from .config import PPOConfig
from .experience import Experience, compute
from .rollout import Rollout, RolloutPrompt, check_rollouts
from .setup import Run, open_log, set_up
from .step_metrics import UpdateMeter, evaluation_metrics, sample_row, step_metrics


def train(config: PPOConfig, *, resolved: dict[str, Any]) -> Path:
    """Runs PPO to its end, or on from the newest checkpoint, and returns the output folder.

    resolved: the configuration as plain values, written to config.yaml.
    Raises ValueError for the caller's mistakes and RuntimeError when the run itself goes wrong.
    """
    dist.init(timeout_seconds=config.timeout_seconds)
    with dist.fail_together():
        folder = checkpoint.prepare_output(config.output, resume=config.resume)
        run = set_up(config)
        state = _resume(run, checkpoint.find_resume(folder, config.resume))
        log = open_log(config, run, folder, step=state.step, run_id=state.run_id, resolved=resolved)
        try:
            _loop(config, run, state, folder, log)
        finally:
            sync.close(run.sampler)
            if log is not None:
                log.close()
                try_report(folder, title="PPO run")
        return folder


@dataclass
class State:
    """What a checkpoint holds besides the engines."""

    step: int = 0
    position: int = 0
    best_score: float | None = None
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    run_id: str | None = None


def _loop(config: PPOConfig, run: Run, state: State, folder: Path, log: MetricLog | None) -> None:
    policy, critic, reference = run.policy, run.critic, run.reference
    temperature, max_tokens = config.sampling.temperature, config.max_tokens_per_gpu
    watch, run.order.position = Stopwatch(), state.position
    sync.push_weights(config, run, state.step)
    if state.step == 0:
        _evaluate(config, run, state, log)

    progress = tqdm(
        total=config.total_steps,
        initial=state.step,
        desc="ppo",
        unit="step",
        disable=not dist.is_main(),
    )
    while state.step < config.total_steps:
        step = state.step + 1
        with watch("rollout"):
            numbers = run.order.take(config.prompts_per_step)
            prompts = run.train_set.prompts(
                numbers, seed=config.seed, step=step, samples=config.samples_per_prompt
            )
            rollouts = _roll_out(run, prompts, config.sampling, version=state.step)
            sync.rest(config, run.sampler)
        with watch("score"):
            scores = _score(run, rollouts)  # [rollouts], the same on every rank
        batch = pack(rollouts)
        mask, cu_seqlens = batch.response_mask, batch.cu_seqlens
        penalised = scores - config.missing_eos_penalty * torch.tensor(
            [float(r.truncated) for r in rollouts]
        )

        with watch("forward"):  # fix the targets before any weight moves
            logprobs, entropy = compute(
                partial(policy, temperature=temperature, with_entropy=True), batch, max_tokens
            )
            (ref_logprobs,) = compute(
                partial(reference, temperature=temperature), batch, max_tokens
            )
            (values,) = compute(critic, batch, max_tokens)  # [tokens], as all these
        rewards = ppo.token_rewards(
            penalised,
            logprobs,
            ref_logprobs,
            mask,
            cu_seqlens,
            kl_coef=config.kl.coef,
            estimator=config.kl.estimator,
        )
        advantages, returns = run.advantages(rewards, values, batch, rollouts)
        whitened = ppo.whiten(advantages, mask) if config.whiten else advantages
        experience = Experience(
            batch=batch, logprobs=logprobs, values=values, advantages=whitened, returns=returns
        )

        meter, rates = UpdateMeter(), (0.0, 0.0)
        with watch("train"):  # improve policy and critic
            for epoch in range(config.epochs):
                minibatches = experience.minibatches(
                    config.minibatches, seed=(config.seed, step, epoch)
                )
                for number, mini in enumerate(minibatches):
                    for micro in mini.microbatches(max_tokens):
                        pg = ppo.policy_loss(
                            policy(micro.batch, temperature=temperature),
                            micro.logprobs,
                            micro.advantages,
                            micro.mask,
                            clip_low=config.clip_low,
                            clip_high=config.clip_high,
                        )
                        vf = ppo.value_loss(
                            critic(micro.batch),
                            micro.values,
                            micro.returns,
                            micro.mask,
                            clip=config.value_clip,
                        )
                        policy.backward(pg.loss_sum, mini.num_response_tokens, last=micro.last)
                        critic.backward(vf.loss_sum, mini.num_response_tokens, last=micro.last)
                        meter.add(pg, vf, first_minibatch=epoch == number == 0)
                    done = ((step - 1) * config.epochs + epoch) * config.minibatches + number
                    rates = run.rates(done)
                    steps = policy.step(rates[0]), critic.step(rates[1])
                    meter.add_step(*steps)
                    _count_skips(config, state, all(s.applied for s in steps), folder, rollouts)

        state.step, state.position = step, run.order.position
        with watch("sync"):
            synced = sync.push_weights(config, run, step)

        row = step_metrics(
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
        )
        seconds = watch.take()
        row |= (
            meter.result()
            | seconds
            | synced
            | {
                "step": step,
                "episodes": step * config.rollouts_per_step,
                "lr_policy": rates[0],
                "lr_value": rates[1],
                "skipped_steps": state.skipped_steps,
                "verifier_inputs_cut": sum(dist.all_gather(run.verifier.num_cut)),
                "verifier_unjudged": sum(dist.all_gather(run.verifier.num_unjudged)),
                "tokens_per_second": row["tokens_generated"] / sum(seconds.values()),
            }
        )
        _record(config, row, rollouts, scores, log)
        best = (
            _evaluate(config, run, state, log) if _due(step, config.eval_every, config) else False
        )
        if best:
            _export(run, folder / "model-best")
        if _due(step, config.save_every, config) or best:
            _save(config, run, state, folder, log, best=best)
        _stop_on_gap(config, row)
        progress.set_postfix(score=f"{row['score_mean']:.3f}", kl=f"{row['kl_mean']:.2f}")
        progress.update()
    progress.close()
    _export(run, folder / "model")


def _roll_out(
    run: Run, prompts: Sequence[RolloutPrompt], sampling: SamplingParams, *, version: int
) -> list[Rollout]:
    """Each rank draws its part; every rank gets all, in the prompts' order, checked."""
    rank, world = dist.rank(), dist.world_size()
    part = prompts[rank::world]
    mine = run.rollout(run.sampler, part, sampling, tokenizer=run.tokenizer)
    if len(mine) != len(part):
        raise ValueError(
            f"the rollout function gave {len(mine)} rollouts for {len(part)} prompts: it must give one each"
        )
    parts = dist.all_gather(mine)
    rollouts = [parts[n % world][n // world] for n in range(len(prompts))]
    check_rollouts(rollouts, vocabulary=run.policy.module.hf.config.vocab_size, version=version)
    return rollouts


def _score(run: Run, rollouts: Sequence[Rollout]) -> torch.Tensor:
    """[rollouts]: each rank scores its part; every rank gets all."""
    rank, world = dist.rank(), dist.world_size()
    parts = dist.all_gather(run.verifier.score(rollouts[rank::world]))
    return torch.tensor(
        [parts[n % world][n // world] for n in range(len(rollouts))], dtype=torch.float64
    )


def _evaluate(config: PPOConfig, run: Run, state: State, log: MetricLog | None) -> bool:
    """Scores the held-out problems; true when their mean score is the best so far."""
    problems = run.eval_set
    if not problems.problems:
        return False
    prompts = problems.prompts(list(range(len(problems.problems))), seed=config.seed, step=-1)
    rollouts = _roll_out(
        run,
        prompts,
        replace(config.sampling, temperature=config.eval_temperature),
        version=state.step,
    )
    scores = _score(run, rollouts)
    row = {"step": state.step} | evaluation_metrics(rollouts, scores, config.verifier.right)
    if log is not None:
        log.write("eval", finite(row), prefix="eval/")
        for rollout, score in zip(rollouts[:4], scores.tolist(), strict=False):
            log.write_text(
                "samples",
                sample_row(rollout, score, config.verifier, step=state.step, split="eval"),
            )
    best = state.best_score is None or row["score_mean"] > state.best_score
    if best:
        state.best_score = row["score_mean"]
    return best and state.step > 0


def _record(
    config: PPOConfig,
    row: dict[str, Any],
    rollouts: Sequence[Rollout],
    scores: torch.Tensor,
    log: MetricLog | None,
) -> None:
    if log is None:
        return
    log.write("metrics", finite(row))
    if row["step"] == 1 or _due(row["step"], config.log_samples_every, config):
        for rollout, score in zip(rollouts[:4], scores.tolist(), strict=False):
            log.write_text(
                "samples",
                sample_row(rollout, score, config.verifier, step=row["step"], split="train"),
            )


def _due(step: int, every: int, config: PPOConfig) -> bool:
    return step % every == 0 or step == config.total_steps


def _count_skips(
    config: PPOConfig, state: State, applied: bool, folder: Path, rollouts: Sequence[Rollout]
) -> None:
    """Counts optimizer steps whose gradient was not finite; several in a row end the run with its rollouts saved."""
    state.skipped_in_a_row = 0 if applied else state.skipped_in_a_row + 1
    state.skipped_steps += not applied
    if state.skipped_in_a_row >= config.max_skipped_steps:
        file = folder / f"rollouts-step-{state.step + 1}.json"
        if dist.is_main():
            file.write_text(json.dumps([vars(r) | {"problem": vars(r.problem)} for r in rollouts]))
        raise RuntimeError(
            f"{state.skipped_in_a_row} optimizer steps in a row had a gradient that is not finite; see {file}"
        )


def _stop_on_gap(config: PPOConfig, row: dict[str, Any]) -> None:
    if row["sampler_logprob_gap_mean"] > config.max_logprob_gap:
        raise RuntimeError(
            f"step {row['step']}: the sampler's log-probs are {row['sampler_logprob_gap_mean']:.3g} nats from the trainer's on "
            f"average, over max_logprob_gap={config.max_logprob_gap}: they do not hold the same weights"
        )


def _resume(run: Run, found: Path | None) -> State:
    if found is None:
        return State()
    with checkpoint.taking_up(found):
        run.policy.load(found, "policy")
        run.critic.load(found, "critic")
        torch.set_rng_state(torch.load(found / f"rng-{dist.rank()}.pt"))
        return State(**checkpoint.load_state(found))


def _save(
    config: PPOConfig, run: Run, state: State, folder: Path, log: MetricLog | None, *, best: bool
) -> None:
    def write(temporary: Path) -> None:
        run.policy.save(temporary, "policy")
        run.critic.save(temporary, "critic")
        torch.save(torch.get_rng_state(), temporary / f"rng-{dist.rank()}.pt")

    state.run_id = log.run_id if log else None
    checkpoint.save(
        folder,
        step=state.step,
        state=vars(state),
        write=write,
        best=best,
        total_limit=config.save_total_limit,
    )


def _export(run: Run, folder: Path) -> None:
    weights = run.policy.full_state()
    if dist.is_main():
        save_model(folder, run.policy.module.hf, weights, run.tokenizer)
