"""The supervised training loop, shared by stage 1 and the verifier."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..core.text.data import Order
from ..core.training import dist
from ..core.training.engine import TrainEngine
from ..core.training.metrics import peak_memory_gib
from ..core.training.packing import share_out
from ..core.training.run import Metrics, RunState, TrainingRun
from ..core.training.schedule import learning_rate
from .config import TrainingConfig

RowT = TypeVar("RowT")


@dataclass(frozen=True, kw_only=True)
class Task(Generic[RowT]):
    """A supervised task: length, weight and loss of its rows, evaluation and export."""

    length: Callable[[RowT], int]
    """Number of tokens in a row."""
    weight: Callable[[RowT], int]
    """Number of terms that a row adds to the loss: its response tokens, or 1."""
    loss_sum: Callable[[TrainEngine, Sequence[RowT]], Tensor]
    """Summed loss of some rows; without rows, a zero connected to every parameter."""
    evaluate: Callable[[TrainEngine, Sequence[RowT]], dict[str, Any]]
    """Metrics of the held-out rows; called on every rank with all of them."""
    export: Callable[[TrainEngine, Path], None]
    """Writes the Hugging Face folder."""


def fit(
    config: TrainingConfig,
    task: Task[RowT],
    engine: TrainEngine,
    rows: Sequence[RowT],
    eval_rows: Sequence[RowT],
    folder: Path,
    *,
    resolved: dict[str, Any],
) -> RunState:
    """Trains to the end, resuming from the newest checkpoint if there is one.

    Leaves the last model in model/ and the one with the lowest held-out loss in model-best/.
    `resolved` is the configuration as plain values, written to config.yaml.
    """
    run = TrainingRun(
        config=config,
        folder=folder,
        engines={"engine": engine},
        export=partial(task.export, engine),
        better=lambda new, old: new["loss"] < old["loss"],
        stop_early=partial(_target_reached, config),
    )
    run.resume(resolved=resolved)
    state = run.state
    total_steps = config.total_steps(len(rows), step=state.step, position=state.position)
    run.start(total_steps, resolved=resolved)
    evaluate = partial(task.evaluate, engine, eval_rows) if eval_rows else None
    with run.saved_on_stop():
        _loop(config, task, engine, rows, evaluate, run)
    run.finish()
    run.close()
    return state


def _loop(
    config: TrainingConfig,
    task: Task[RowT],
    engine: TrainEngine,
    rows: Sequence[RowT],
    evaluate: Callable[[], Metrics] | None,
    run: TrainingRun[TrainingConfig],
) -> None:
    state = run.state
    order = Order(len(rows), seed=config.seed, position=state.position)
    last_position = sys.maxsize if config.max_steps else len(rows) * config.epochs
    if evaluate and state.step == 0:
        run.seed_draws("evaluation", 0)
        run.log_evaluation(evaluate())
    run.resume_end(evaluate)

    for step, bar in run.steps("train"):
        with run.watch("train"):
            size = min(config.batch_size, last_position - order.position)
            batch = [rows[n] for n in order.take(size)]
            loss, num_tokens = _accumulate(
                task, engine, batch, config.max_tokens_per_gpu, run.stop_if_asked
            )
            rate = _learning_rate(config, step - 1, run.total_steps)
            result = engine.step(rate)
        run.count_skipped(result.applied)
        state.step = step
        state.position = order.position
        state.tokens += num_tokens
        run.log_metrics(
            {
                "epoch": order.position / len(rows),
                "loss": loss,
                "lr": rate,
                "grad_norm": result.grad_norm,
                **_speed(run, num_tokens),
            }
        )
        run.end_step(evaluate)
        bar.set_postfix(loss=f"{loss:.4f}")


def _speed(run: TrainingRun[TrainingConfig], num_tokens: int) -> Metrics:
    """Counts and times of the step that just ended."""
    seconds = run.watch.take()
    return {
        "skipped_steps": run.state.skipped_steps,
        "tokens": run.state.tokens,
        "tokens_per_second": num_tokens / sum(seconds.values()),
        "peak_memory_gib": peak_memory_gib(),
        **seconds,
    }


def _learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    return learning_rate(
        step,
        peak=config.learning_rate,
        total_steps=total_steps,
        warmup_ratio=config.warmup_ratio,
        kind=config.schedule,
    )


def _accumulate(
    task: Task[RowT],
    engine: TrainEngine,
    batch: Sequence[RowT],
    max_tokens: int,
    before_micro_batch: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """Runs forward and backward over this rank's share of a batch.

    Returns the mean loss and the number of tokens of the whole batch, over all ranks.
    """
    lengths = [task.length(row) for row in batch]
    weight = sum(task.weight(row) for row in batch)
    plan = share_out(
        lengths,
        max_tokens=max_tokens,
        rank=dist.rank(),
        world_size=dist.world_size(),
    )
    total = torch.zeros(1, dtype=torch.float64, device=dist.device())
    for number, micro in enumerate(plan):
        before_micro_batch()
        loss_sum = task.loss_sum(engine, [batch[i] for i in micro])
        engine.backward(loss_sum, weight, last=number == len(plan) - 1)
        total += loss_sum.detach().double()
    return float(dist.all_sum(total)) / weight, sum(lengths)


def _target_reached(config: TrainingConfig, state: RunState) -> bool:
    target = config.stop_at_loss
    return target is not None and state.best is not None and state.best["loss"] <= target
