"""The supervised loop, shared by stage 1 and the verifier: packed batches, an exact mean over them, exact resume."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ..core.text.data import Order
from ..core.training import checkpoint, dist
from ..core.training.engine import TrainEngine
from ..core.training.metrics import MetricLog, Stopwatch, finite, peak_memory_gib, start_log
from ..core.training.packing import share_out
from ..core.training.schedule import learning_rate
from .config import TrainingConfig

Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class Task(Generic[Row]):
    """What is learned: how long a row is, how much it weighs, and what it costs."""

    length: Callable[[Row], int]
    """tokens of a row"""
    weight: Callable[[Row], int]
    """what the loss is a mean over: response tokens, or 1 for each row"""
    loss_sum: Callable[[TrainEngine, Sequence[Row]], Tensor]
    """the summed loss of some rows, perhaps none: then a zero that stays connected to every parameter"""
    evaluate: Callable[[TrainEngine, Sequence[Row]], dict[str, Any]]
    """metrics on held-out rows; every rank calls it with all rows"""
    better: Callable[[dict[str, Any], dict[str, Any]], bool]
    """whether the first evaluation beats the second"""
    export: Callable[[TrainEngine, Path], None]
    """writes the Hugging Face folder"""


@dataclass
class State:
    """What a checkpoint holds besides the engine."""

    step: int = 0
    position: int = 0
    tokens: int = 0
    best: dict[str, Any] | None = None
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    run_id: str | None = None


def fit(
    config: TrainingConfig,
    task: Task[Row],
    engine: TrainEngine,
    rows: Sequence[Row],
    eval_rows: Sequence[Row],
    folder: Path,
    *,
    resolved: dict[str, Any],
) -> State:
    """Trains to the end, or on from the newest checkpoint. Leaves model/ (the last) and model-best/ (the best evaluated)."""
    state = _resume(engine, checkpoint.find_resume(folder, config.resume))
    total_steps = config.total_steps(len(rows), step=state.step, position=state.position)
    log = _open_log(config, folder, state, total_steps, resolved)
    last_position = sys.maxsize if config.max_steps else len(rows) * config.epochs
    order, watch = Order(len(rows), seed=config.seed, position=state.position), Stopwatch()
    if state.step == 0:
        _evaluate(task, engine, eval_rows, state, log)

    progress = tqdm(
        total=total_steps, initial=state.step, desc="train", unit="step", disable=not dist.is_main()
    )
    while state.step < total_steps and not _reached(config, state):
        with watch("train"):
            batch = [
                rows[n] for n in order.take(min(config.batch_size, last_position - order.position))
            ]
            loss, num_tokens = _accumulate(task, engine, batch, config.max_tokens_per_gpu)
            rate = learning_rate(
                state.step,
                peak=config.learning_rate,
                total_steps=total_steps,
                warmup_ratio=config.warmup_ratio,
                kind=config.schedule,
            )
            result = engine.step(rate)
        _count_skips(config, state, result.applied)
        state.step, state.position, state.tokens = (
            state.step + 1,
            order.position,
            state.tokens + num_tokens,
        )
        if log is not None:
            seconds = watch.take()
            log.write(
                "metrics",
                finite(
                    {
                        "step": state.step,
                        "epoch": order.position / len(rows),
                        "loss": loss,
                        "lr": rate,
                        "grad_norm": result.grad_norm,
                        "skipped_steps": state.skipped_steps,
                        "tokens": state.tokens,
                        "tokens_per_second": num_tokens / sum(seconds.values()),
                        "peak_memory_gib": peak_memory_gib(),
                        **seconds,
                    }
                ),
            )
        best = False
        if state.step == total_steps or state.step % config.eval_every == 0:
            best = _evaluate(task, engine, eval_rows, state, log)
        if best:
            task.export(engine, folder / "model-best")
        ends = state.step == total_steps or _reached(config, state)
        if ends or state.step % config.save_every == 0:
            _save(config, engine, state, folder, log, best=best)
        progress.set_postfix(loss=f"{loss:.4f}")
        progress.update()
    progress.close()
    task.export(engine, folder / "model")
    if log is not None:
        log.close()
    return state


def _accumulate(
    task: Task[Row], engine: TrainEngine, batch: Sequence[Row], max_tokens: int
) -> tuple[float, int]:
    """Forward and backward over the batch, every rank its share; the mean loss, and the tokens of all ranks."""
    lengths = [task.length(row) for row in batch]
    weight = sum(task.weight(row) for row in batch)
    plan = share_out(lengths, max_tokens=max_tokens, rank=dist.rank(), world_size=dist.world_size())
    total = torch.zeros(1, dtype=torch.float64, device=dist.device())
    for number, micro in enumerate(plan):
        loss_sum = task.loss_sum(engine, [batch[i] for i in micro])
        engine.backward(loss_sum, weight, last=number == len(plan) - 1)
        total += loss_sum.detach().double()
    return float(dist.all_sum(total)) / weight, sum(lengths)


def _evaluate(
    task: Task[Row], engine: TrainEngine, rows: Sequence[Row], state: State, log: MetricLog | None
) -> bool:
    """Evaluates and logs; true when it is the best so far, not counting the untrained model."""
    if not rows:
        return False
    metrics = task.evaluate(engine, rows)
    if log is not None:
        log.write("eval", finite({"step": state.step, **metrics}), prefix="eval/")
    if state.step > 0 and (state.best is None or task.better(metrics, state.best)):
        state.best = metrics
        return True
    return False


def _reached(config: TrainingConfig, state: State) -> bool:
    return (
        config.stop_at_loss is not None
        and state.best is not None
        and state.best["loss"] <= config.stop_at_loss
    )


def _count_skips(config: TrainingConfig, state: State, applied: bool) -> None:
    state.skipped_in_a_row = 0 if applied else state.skipped_in_a_row + 1
    state.skipped_steps += not applied
    if state.skipped_in_a_row >= config.max_skipped_steps:
        raise RuntimeError(
            f"{state.skipped_in_a_row} optimizer steps in a row had a gradient that is not finite"
        )


def _resume(engine: TrainEngine, found: Path | None) -> State:
    if found is None:
        return State()
    with checkpoint.taking_up(found):
        engine.load(found, "engine")
        return State(**checkpoint.load_state(found))


def _save(
    config: TrainingConfig,
    engine: TrainEngine,
    state: State,
    folder: Path,
    log: MetricLog | None,
    *,
    best: bool,
) -> None:
    state.run_id = log.run_id if log else None
    checkpoint.save(
        folder,
        step=state.step,
        state=vars(state),
        write=lambda temporary: engine.save(temporary, "engine"),
        best=best,
        total_limit=config.save_total_limit,
    )


def _open_log(
    config: TrainingConfig, folder: Path, state: State, total_steps: int, resolved: dict[str, Any]
) -> MetricLog | None:
    if not dist.is_main():
        return None
    return start_log(
        folder,
        log_to=config.log_to,
        step=state.step,
        total_steps=total_steps,
        config=resolved,
        world_size=dist.world_size(),
        run_id=state.run_id,
    )
