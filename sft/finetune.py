"""Stage 1: packed fine-tuning on answers that reason before they conclude."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core.report.run_report import try_report
from ..core.text.data import split
from ..core.text.stop_tokens import stop_token_ids
from ..core.training import checkpoint, dist
from ..core.training.engine import TrainEngine
from ..core.training.packing import PackedBatch, empty_batch, pack, share_out
from ..core.training.pretrained import check_embedding, load_policy, load_tokenizer, save_model
from ..core.training.run import print_next_commands
from .config import SFTConfig, TrainingConfig
from .examples import Example, load_examples
from .train import Task, fit

RowT = TypeVar("RowT")
NEXT_COMMANDS = (
    "verippo verifier --model MODEL --data rows.json --output runs/verifier",
    "verippo ppo --policy MODEL --verifier.model runs/verifier/model --data problems.json "
    "--steps 100 --output runs/ppo",
    "verippo eval --engine local --model MODEL --data test.json --output runs/eval",
)
MAX_NAMED_ROWS = 20
"""Number of over-long rows that a message names."""


def train(config: SFTConfig, *, resolved: dict[str, Any]) -> Path:
    """Runs stage 1 to its end, resuming from the newest checkpoint if there is one.

    Args:
        config: the run's configuration.
        resolved: the configuration as plain values, written to config.yaml.

    Returns:
        The output folder.

    Raises:
        ValueError: configuration, data or model are invalid or do not fit together.
    """
    dist.init(
        timeout_seconds=config.timeout_seconds,
        heartbeat_seconds=config.heartbeat_seconds,
    )
    with dist.fail_together():
        folder = checkpoint.prepare_output(config.output, resume=config.resume)
        tokenizer = load_tokenizer(config.model)
        load = partial(
            load_examples,
            tokenizer=tokenizer,
            limit=config.limit,
            system=config.system_prompt,
            workers=config.tokenize_workers,
            columns=config.columns,
        )
        rows, eval_rows = train_and_eval_rows(config, load, lambda row: row.num_tokens)
        policy = load_policy(config.model, dtype=config.dtype)
        check_embedding(policy.hf.config, tokenizer, config.model)
        engine = TrainEngine(policy, config.engine)
        task = _task(config, tokenizer)
        try:
            fit(config, task, engine, rows, eval_rows, folder, resolved=resolved)
        finally:
            if dist.is_main():
                try_report(folder, title="Supervised fine-tuning")
        print_next_commands(folder, *NEXT_COMMANDS)
        return folder


def train_and_eval_rows(
    config: TrainingConfig,
    load: Callable[..., list[RowT]],
    length: Callable[[RowT], int],
    group: Callable[[RowT], int] | None = None,
) -> tuple[list[RowT], list[RowT]]:
    """The rows to train on and the held-out rows, without over-long ones.

    Args:
        config: names the data and the share to hold out.
        load: reads the rows of a comma-separated list of sources, for a `purpose`.
        length: number of tokens in a row.
        group: number of a row's group; its rows share an answer and are held out together.

    Raises:
        ValueError: a row is too long and `overlong` is "refuse", or no row is left.
    """
    rows = load(config.data)
    if config.eval_data:
        train_rows = rows
        eval_rows = load(config.eval_data, purpose="validation")
    else:
        groups = [group(row) for row in rows] if group else list(range(len(rows)))
        names = sorted(set(groups))
        _, drawn = split(len(names), fraction=config.eval_fraction, seed=config.seed)
        held_out = {names[n] for n in drawn}
        train_rows = [row for row, name in zip(rows, groups, strict=True) if name not in held_out]
        eval_rows = [row for row, name in zip(rows, groups, strict=True) if name in held_out]
    train_rows = _within_length(config, train_rows, length, name="training")
    eval_rows = _within_length(config, eval_rows, length, name="evaluation")
    if not train_rows:
        raise ValueError(f"data {config.data}: no row is left to train on")
    return train_rows, eval_rows


def _within_length(
    config: TrainingConfig,
    rows: list[RowT],
    length: Callable[[RowT], int],
    *,
    name: str,
) -> list[RowT]:
    """Drops over-long rows with a message, or refuses them."""
    too_long = [n for n, row in enumerate(rows) if length(row) > config.max_seq_len]
    if too_long:
        numbers = ", ".join(map(str, too_long[:MAX_NAMED_ROWS]))
        numbers += " ..." if len(too_long) > MAX_NAMED_ROWS else ""
        message = (
            f"{len(too_long)} {name} rows of {len(rows)} are over "
            f"max_seq_len={config.max_seq_len} tokens: rows {numbers}"
        )
        if config.overlong == "refuse":
            raise ValueError(f"{message}: raise it, or set overlong=drop to leave them out")
        if dist.is_main():
            print(f"dropped: {message}")
    return [row for row in rows if length(row) <= config.max_seq_len]


def _task(config: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> Task[Example]:
    stops = stop_token_ids(config.model, tokenizer)

    def loss_sum(engine: TrainEngine, rows: Sequence[Example]) -> Tensor:
        return -engine(packed(rows)).sum()

    def evaluate(engine: TrainEngine, rows: Sequence[Example]) -> dict[str, Any]:
        return _evaluate(engine, rows, config.max_tokens_per_gpu)

    def export(engine: TrainEngine, folder: Path) -> None:
        weights = engine.full_state()
        if dist.is_main():
            save_model(folder, engine.module.hf, weights, tokenizer, stop_token_ids=stops)

    return Task(
        length=lambda row: row.num_tokens,
        weight=lambda row: len(row.response_ids),
        loss_sum=loss_sum,
        evaluate=evaluate,
        export=export,
    )


@torch.no_grad()
def _evaluate(engine: TrainEngine, rows: Sequence[Example], max_tokens: int) -> dict[str, Any]:
    """Loss (nats per response token), perplexity and next-token accuracy of the rows."""
    lengths = [row.num_tokens for row in rows]
    plan = share_out(
        lengths,
        max_tokens=max_tokens,
        rank=dist.rank(),
        world_size=dist.world_size(),
    )
    sums = torch.zeros(2, dtype=torch.float64, device=dist.device())
    for micro in plan:
        logprobs, greedy = engine(packed([rows[i] for i in micro]), with_greedy=True)
        sums += torch.stack([-logprobs.double().sum(), greedy.double().sum()])
    num = sum(len(row.response_ids) for row in rows)
    loss, accuracy = (dist.all_sum(sums) / num).tolist()
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "token_accuracy": accuracy,
        "num_tokens": num,
    }


def packed(rows: Sequence[Example]) -> PackedBatch:
    """The rows as one packed batch on this rank's device; without rows, a batch without loss."""
    return (pack(rows) if rows else empty_batch()).to(dist.device())
