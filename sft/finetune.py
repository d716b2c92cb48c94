"""Stage 1: packed fine-tuning on answers that think first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core.report.run_report import try_report
from ..core.text.data import split
from ..core.training import checkpoint, dist
from ..core.training.engine import TrainEngine
from ..core.training.model import check_embedding, load_policy, load_tokenizer, save_model
from ..core.training.packing import PackedBatch, empty_batch, pack, share_out
from .config import SFTConfig, TrainingConfig
from .examples import Example, load_examples
from .train import Task, fit

Row = TypeVar("Row")


def train(config: SFTConfig, *, resolved: dict[str, Any]) -> Path:
    """Runs stage 1 to its end, or on from the newest checkpoint, and returns the output folder.

    resolved: the configuration as plain values, written to config.yaml. Raises ValueError for the caller's mistakes.
    """
    dist.init(timeout_seconds=config.timeout_seconds)
    with dist.fail_together():
        folder = checkpoint.prepare_output(config.output, resume=config.resume)
        tokenizer = load_tokenizer(config.model)

        def load(sources: str) -> list[Example]:
            return load_examples(
                sources,
                tokenizer,
                limit=config.limit,
                system=config.system_prompt,
                workers=config.tokenize_workers,
            )

        rows, eval_rows = train_and_eval_rows(config, load, lambda row: row.num_tokens)
        policy = load_policy(config.model, dtype=config.dtype)
        check_embedding(policy.hf.config, tokenizer, config.model)
        engine = TrainEngine(policy, config.engine)
        try:
            fit(
                config, _task(config, tokenizer), engine, rows, eval_rows, folder, resolved=resolved
            )
        finally:
            if dist.is_main():
                try_report(folder, title="Supervised fine-tuning")
        return folder


def train_and_eval_rows(
    config: TrainingConfig,
    load: Callable[[str], list[Row]],
    length: Callable[[Row], int],
    group: Callable[[Row], int] | None = None,
) -> tuple[list[Row], list[Row]]:
    """The rows to train on and those held out, without over-long ones: these are counted and named, or refused.

    group: rows of one group are held out together, or they would tell of each other.
    Raises ValueError when config.overlong is "refuse" and there is one, and when no row is left.
    """
    rows = load(config.data)
    if config.eval_data:
        train_rows, eval_rows = rows, load(config.eval_data)
    else:
        groups = [group(row) for row in rows] if group else list(range(len(rows)))
        names = sorted(set(groups))
        held_out = {
            names[n] for n in split(len(names), fraction=config.eval_fraction, seed=config.seed)[1]
        }
        train_rows = [row for row, name in zip(rows, groups, strict=True) if name not in held_out]
        eval_rows = [row for row, name in zip(rows, groups, strict=True) if name in held_out]
    fitting = []
    for name, part in (("training", train_rows), ("evaluation", eval_rows)):
        long = [n for n, row in enumerate(part) if length(row) > config.max_seq_len]
        if long:
            message = f"{len(long)} {name} rows of {len(part)} are over max_seq_len={config.max_seq_len} tokens: rows "
            message += ", ".join(map(str, long[:20])) + (" ..." if len(long) > 20 else "")
            if config.overlong == "refuse":
                raise ValueError(f"{message}: raise it, or overlong=drop leaves them out")
            if dist.is_main():
                print(f"dropped: {message}")
        fitting.append([row for row in part if length(row) <= config.max_seq_len])
    if not fitting[0]:
        raise ValueError(f"data {config.data}: no row is left to train on")
    return fitting[0], fitting[1]


def _task(config: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> Task[Example]:
    def loss_sum(engine: TrainEngine, rows: Sequence[Example]) -> Tensor:
        return -engine(packed(rows)).sum()

    def evaluate(engine: TrainEngine, rows: Sequence[Example]) -> dict[str, Any]:
        lengths = [row.num_tokens for row in rows]
        plan = share_out(
            lengths,
            max_tokens=config.max_tokens_per_gpu,
            rank=dist.rank(),
            world_size=dist.world_size(),
        )
        sums = torch.zeros(2, dtype=torch.float64, device=dist.device())
        with torch.no_grad():
            for micro in plan:
                logprobs, greedy = engine(packed([rows[i] for i in micro]), with_greedy=True)
                sums += torch.stack([-logprobs.double().sum(), greedy.double().sum()])
        num = sum(len(row.response_ids) for row in rows)
        loss, right = (dist.all_sum(sums) / num).tolist()
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": right,
            "num_tokens": num,
        }

    def export(engine: TrainEngine, folder: Path) -> None:
        weights = engine.full_state()
        if dist.is_main():
            save_model(folder, engine.module.hf, weights, tokenizer)

    return Task(
        length=lambda row: row.num_tokens,
        weight=lambda row: len(row.response_ids),
        loss_sum=loss_sum,
        evaluate=evaluate,
        export=export,
    )


def packed(rows: Sequence[Example]) -> PackedBatch:
    """The rows as one packed batch on this rank's device; without rows the batch that trains nothing."""
    return (pack(rows) if rows else empty_batch()).to(dist.device())
