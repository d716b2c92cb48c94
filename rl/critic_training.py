"""Trains a critic on stored rollouts, before PPO begins (arXiv 2503.01491, section 4.1)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress, repeat
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..core.report.run_report import try_report
from ..core.text.data import Order, split
from ..core.training import checkpoint, dist
from ..core.training.engine import TrainEngine
from ..core.training.metrics import peak_memory_gib
from ..core.training.packing import pack
from ..core.training.pretrained import check_embedding, load_critic, load_tokenizer, save_model
from ..core.training.run import Metrics, TrainingRun, print_next_commands
from ..core.training.schedule import learning_rate
from . import ppo
from .critic_config import CriticConfig
from .experience import Experience, MiniBatch, compute
from .step_metrics import explained_variance, quarter_metrics
from .stored_rollouts import StoredRollout, load_stored


def train(config: CriticConfig, *, resolved: dict[str, Any]) -> Path:
    """Trains the critic to its end, resuming from the newest checkpoint if there is one.

    Leaves the last model in model/ and the one with the lowest held-out loss in model-best/.

    Args:
        config: the run's configuration.
        resolved: the configuration as plain values, written to config.yaml.

    Returns:
        The output folder.

    Raises:
        ValueError: configuration, rollouts or model are invalid or do not fit together.
    """
    dist.init(timeout_seconds=config.timeout_seconds)
    with dist.fail_together():
        folder = checkpoint.prepare_output(config.output, resume=config.resume)
        tokenizer = load_tokenizer(config.model)
        module = load_critic(
            config.model,
            dtype=config.dtype,
            head=config.critic_head,
            freeze=config.critic_freeze,
        )
        check_embedding(module.hf.config, tokenizer, config.model)
        vocabulary = module.hf.config.get_text_config().vocab_size
        rollouts, held_out = _train_and_eval_rollouts(config, vocabulary)
        critic = TrainEngine(module, config.engine)
        run = TrainingRun(
            config=config,
            folder=folder,
            engines={"critic": critic},
            export=partial(_export, critic, tokenizer),
            better=lambda new, old: new["value_loss"] < old["value_loss"],
        )
        try:
            _fit(config, run, critic, rollouts, held_out, resolved=resolved)
        finally:
            if dist.is_main():
                try_report(folder, title="Critic pre-training")
        print_next_commands(
            folder,
            "verippo ppo --policy runs/sft/model --critic MODEL "
            "--verifier.model runs/verifier/model --data problems.json --steps 100 "
            "--output runs/ppo",
        )
        return folder


def _fit(
    config: CriticConfig,
    run: TrainingRun[CriticConfig],
    critic: TrainEngine,
    rollouts: Sequence[StoredRollout],
    held_out: Sequence[StoredRollout],
    *,
    resolved: dict[str, Any],
) -> None:
    run.resume(resolved=resolved)
    state = run.state
    steps = config.total_steps(len(rollouts), step=state.step, position=state.position)
    run.start(steps, resolved=resolved)
    evaluate = None
    if held_out:
        experience = with_returns(held_out, gamma=config.gamma)
        evaluate = partial(_evaluate, critic, experience, config.max_tokens_per_gpu)
    with run.saved_on_stop():
        _loop(config, run, critic, rollouts, evaluate)
    run.finish()
    run.close()


def _loop(
    config: CriticConfig,
    run: TrainingRun[CriticConfig],
    critic: TrainEngine,
    rollouts: Sequence[StoredRollout],
    evaluate: Callable[[], Metrics] | None,
) -> None:
    state = run.state
    order = Order(len(rollouts), seed=config.seed, position=state.position)
    last_position = sys.maxsize if config.max_steps else len(rollouts) * config.epochs
    if evaluate and state.step == 0:
        run.seed_draws("evaluation", 0)
        run.log_evaluation(evaluate())
    run.resume_end(evaluate)

    for step, bar in run.steps("critic"):
        size = min(config.batch_size, last_position - order.position)
        experience = with_returns([rollouts[n] for n in order.take(size)], gamma=config.gamma)
        mini = MiniBatch(experience=experience, seqs=list(range(size)))
        sums = torch.zeros(2, dtype=torch.float64, device=dist.device())
        with run.watch("train"):
            for micro in mini.microbatches(config.max_tokens_per_gpu):
                run.stop_if_asked()
                values = critic(micro.batch)
                vf = ppo.value_loss(values, micro.values, micro.returns, micro.mask, clip=None)
                critic.backward(vf.loss_sum, mini.num_response_tokens, last=micro.last)
                error = (micro.returns - values)[micro.mask].detach().sum()
                sums += torch.stack([vf.loss_sum.detach().double(), error.double()])
            rate = _learning_rate(config, step - 1, run.total_steps)
            result = critic.step(rate)
        run.count_skipped(result.applied)
        state.step = step
        state.position = order.position
        state.tokens += experience.batch.num_tokens
        row = _fit_metrics(dist.all_sum(sums).tolist(), experience)
        run.log_metrics(
            row
            | {
                "epoch": order.position / len(rollouts),
                "lr_value": rate,
                "grad_norm_value": result.grad_norm,
                **_speed(run, experience.batch.num_tokens),
            }
        )
        run.end_step(evaluate)
        bar.set_postfix(explained=f"{row['explained_variance']:.2f}")


def with_returns(rollouts: Sequence[StoredRollout], *, gamma: float) -> Experience:
    """Packs stored rollouts with the returns of their rewards, as PPO has them with lam_critic=1.

        return_t = r_t + gamma return_{t+1}

    Args:
        rollouts: the rollouts.
        gamma: discount factor, in 0..1.

    Returns:
        Experience with rewards and returns; everything else is zero.
    """
    batch = pack(rollouts)
    mask = batch.response_mask
    nothing = torch.zeros(batch.num_tokens)
    rewards = nothing.clone()
    written = (rollout.response_mask or repeat(True) for rollout in rollouts)
    rewards[mask] = torch.tensor(
        [x for one, own in zip(rollouts, written, strict=True) for x in compress(one.rewards, own)]
    )
    _, returns = ppo.gae(rewards, nothing, mask, batch.cu_seqlens, gamma=gamma, lam=1.0)
    return Experience(
        batch=batch,
        logprobs=nothing,
        values=nothing,
        advantages=nothing,
        returns=returns,
        ref_logprobs=nothing,
        rewards=rewards,
    )


def _fit_metrics(sums: Sequence[float], experience: Experience) -> dict[str, float]:
    """Loss and explained variance of a batch before its update.

    Args:
        sums: half the squared errors and the errors, summed over the response tokens of all ranks.
        experience: the batch.
    """
    returns = experience.returns[experience.batch.response_mask].double()
    loss, error = (total / len(returns) for total in sums)
    variance = float(returns.var(correction=0))
    explained = 1 - (2 * loss - error**2) / variance if variance > 0 else 0.0
    return {"value_loss": loss, "explained_variance": explained}


def _evaluate(critic: TrainEngine, experience: Experience, max_tokens: int) -> Metrics:
    """Loss and explained variance of held-out rollouts, over all tokens and by quarter."""
    batch = experience.batch
    returns = experience.returns
    (values,) = compute(critic, batch, max_tokens)
    vf = ppo.value_loss(values, values, returns, batch.response_mask, clip=None)
    return {
        "num": batch.num_seqs,
        "value_loss": float(vf.loss_sum / vf.num_tokens),
        "explained_variance": float(explained_variance(values, returns, batch.response_mask)),
        **quarter_metrics(values, returns - values, returns, batch),
    }


def _learning_rate(config: CriticConfig, step: int, total_steps: int) -> float:
    return learning_rate(
        step,
        peak=config.learning_rate,
        total_steps=total_steps,
        warmup_ratio=config.warmup_ratio,
        kind=config.schedule,
    )


def _speed(run: TrainingRun[CriticConfig], num_tokens: int) -> Metrics:
    """Counts and times of the step that just ended."""
    seconds = run.watch.take()
    return {
        "skipped_steps": run.state.skipped_steps,
        "tokens": run.state.tokens,
        "tokens_per_second": num_tokens / sum(seconds.values()),
        "peak_memory_gib": peak_memory_gib(),
        **seconds,
    }


def _train_and_eval_rollouts(
    config: CriticConfig, vocabulary: int
) -> tuple[list[StoredRollout], list[StoredRollout]]:
    """The rollouts to train on and the held-out ones, which share no question."""
    load = partial(
        load_stored,
        limit=config.limit,
        max_tokens=config.max_tokens_per_gpu,
        vocabulary=vocabulary,
    )
    rollouts = load(config.data)
    if config.eval_data:
        return rollouts, load(config.eval_data)
    questions = sorted({rollout.question for rollout in rollouts})
    _, drawn = split(len(questions), fraction=config.eval_fraction, seed=config.seed)
    held_out = {questions[n] for n in drawn}
    return (
        [rollout for rollout in rollouts if rollout.question not in held_out],
        [rollout for rollout in rollouts if rollout.question in held_out],
    )


def _export(critic: TrainEngine, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    weights = critic.full_state()
    if dist.is_main():
        save_model(folder, critic.module.hf, weights, tokenizer)
