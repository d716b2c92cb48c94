"""Trains the two-class verifier that PPO is rewarded by, and says how far it can be trusted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core.llm.judge import Case, Judge
from ..core.report.run_report import try_report
from ..core.report.statistics import wilson_interval
from ..core.text.verifier_text import load_template
from ..core.training import checkpoint, dist
from ..core.training.engine import TrainEngine
from ..core.training.model import check_embedding, load_classifier, load_tokenizer, save_model
from ..core.training.packing import PackedBatch, empty_batch, share_out
from .config import VerifierTrainingConfig
from .finetune import train_and_eval_rows
from .train import Task, fit
from .verifier_examples import LabelledIds, load_answers, tokenise


def train(config: VerifierTrainingConfig, *, resolved: dict[str, Any]) -> Path:
    """Trains to the end, or on from the newest checkpoint; writes model/ with calibration.json beside its weights, and
    returns the output folder. Raises ValueError for the caller's mistakes."""
    dist.init(timeout_seconds=config.timeout_seconds)
    with dist.fail_together():
        folder = checkpoint.prepare_output(config.output, resume=config.resume)
        tokenizer, template = load_tokenizer(config.model), load_template(config.template)
        judge = partial(_judge, config, folder) if config.llm.model else None

        def load(sources: str) -> list[LabelledIds]:
            answers, kinds = load_answers(
                sources,
                limit=config.limit,
                seed=config.seed,
                wrong_per_question=config.wrong_per_question,
                judge=judge,
            )
            rows, num_cut = tokenise(
                answers, tokenizer, template=template, max_tokens=config.max_seq_len
            )
            if dist.is_main():
                found = ", ".join(f"{count} {kind} rows" for kind, count in kinds.items())
                right = sum(row.label for row in rows)
                cut = f"{num_cut} cut to max_seq_len={config.max_seq_len}"
                print(f"{sources}: {found} -> {len(rows)} answers, {right} right; {cut}")
            return rows

        rows, eval_rows = train_and_eval_rows(
            config, load, lambda row: len(row.token_ids), lambda row: row.row
        )
        module = load_classifier(config.model, dtype=config.dtype, fresh_head=True)
        check_embedding(module.hf.config, tokenizer, config.model)
        engine = TrainEngine(module, config.engine)
        task = _task(config, tokenizer)
        try:
            fit(config, task, engine, rows, eval_rows, folder, resolved=resolved)
            if eval_rows:
                labels = torch.tensor([row.label for row in eval_rows])
                report = calibration(
                    probabilities(engine, eval_rows, config.max_tokens_per_gpu),
                    labels,
                    config.threshold,
                )
                _write_calibration(folder, report)
        finally:
            if dist.is_main():
                try_report(folder, title="Verifier training")
        return folder


def _judge(config: VerifierTrainingConfig, folder: Path, cases: list[Case]) -> list[bool | None]:
    """The LLM's verdicts, the same on every rank; one of them asks."""
    journal = folder / "judge-journal.jsonl"
    return dist.broadcast(
        Judge(config.llm, journal=journal).verdicts(cases, progress="judge")
        if dist.is_main()
        else []
    )


def _task(config: VerifierTrainingConfig, tokenizer: PreTrainedTokenizerBase) -> Task[LabelledIds]:
    def loss_sum(engine: TrainEngine, rows: Sequence[LabelledIds]) -> Tensor:
        logits = engine(packed(rows))
        if not rows:
            return logits.sum() * 0.0
        labels = torch.tensor([row.label for row in rows], device=logits.device)
        return F.cross_entropy(logits, labels, reduction="sum")

    def evaluate(engine: TrainEngine, rows: Sequence[LabelledIds]) -> dict[str, Any]:
        p, labels = (
            probabilities(engine, rows, config.max_tokens_per_gpu),
            torch.tensor([row.label for row in rows]),
        )
        loss = F.binary_cross_entropy(p.clamp(1e-7, 1 - 1e-7), labels.double())
        right = ((p > config.threshold) == labels.bool()).double().mean()
        return {"loss": float(loss), "accuracy": float(right), "num": len(rows)}

    def export(engine: TrainEngine, folder: Path) -> None:
        weights = engine.full_state()
        if dist.is_main():
            save_model(folder, engine.module.hf, weights, tokenizer)

    return Task(
        length=lambda row: len(row.token_ids),
        weight=lambda row: 1,
        loss_sum=loss_sum,
        evaluate=evaluate,
        better=lambda new, old: new["loss"] < old["loss"],
        export=export,
    )


@torch.no_grad()
def probabilities(engine: TrainEngine, rows: Sequence[LabelledIds], max_tokens: int) -> Tensor:
    """P(right) of every row, [rows] float64, the same on every rank; each computes its share."""
    lengths = [len(row.token_ids) for row in rows]
    result = torch.zeros(len(rows), dtype=torch.float64, device=dist.device())
    for micro in share_out(
        lengths, max_tokens=max_tokens, rank=dist.rank(), world_size=dist.world_size()
    ):
        logits = engine(packed([rows[i] for i in micro]))
        if micro:
            result[micro] = logits.double().softmax(-1)[:, 1]
    return dist.all_sum(result).cpu()


def packed(rows: Sequence[LabelledIds]) -> PackedBatch:
    """The rows end to end on this rank's device; without rows the batch that trains nothing."""
    if not rows:
        return empty_batch().to(dist.device())
    tokens = torch.tensor([token for row in rows for token in row.token_ids])
    lengths = torch.tensor([0, *(len(row.token_ids) for row in rows)], dtype=torch.int32)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    batch = PackedBatch(
        tokens=tokens, cu_seqlens=lengths.cumsum(0, dtype=torch.int32), response_mask=mask
    )
    return batch.to(dist.device())


def calibration(p: Tensor, labels: Tensor, threshold: float) -> dict[str, Any]:
    """What held-out rows say of a verifier: rates at the threshold with 95 % intervals, a reliability curve over ten bins
    of P(right), and the rates at other thresholds. p [rows] in 0..1, labels [rows] 0 or 1."""
    labels = labels.bool()
    report: dict[str, Any] = {
        "num": len(p),
        "threshold": threshold,
        **_rates(p > threshold, labels),
    }
    bins = (p * 10).long().clamp(max=9)
    report["curve"] = [
        {
            "bin_low": b / 10,
            "bin_high": (b + 1) / 10,
            "mean_predicted": float(p[bins == b].mean()),
            "share_right": float(labels[bins == b].double().mean()),
            "num": int((bins == b).sum()),
        }
        for b in range(10)
        if bool((bins == b).any())
    ]
    report["thresholds"] = [
        {"threshold": t / 10}
        | {
            name: rate["value"]
            for name, rate in _rates(p > t / 10, labels).items()
            if name in ("accuracy", "false_positive_rate", "false_negative_rate")
        }
        for t in range(1, 10)
    ]
    return report


def _rates(said: Tensor, labels: Tensor) -> dict[str, dict[str, float | None]]:
    """said, labels [rows] bool."""

    def share(hits: Tensor, of: Tensor) -> dict[str, float | None]:
        count, num = int((hits & of).sum()), int(of.sum())
        if num == 0:
            return {"value": None, "low": None, "high": None}
        low, high = wilson_interval(count, num)
        return {"value": count / num, "low": low, "high": high}

    return {
        "accuracy": share(said == labels, torch.ones_like(labels)),
        "precision": share(labels, said),
        "recall": share(said, labels),
        "false_positive_rate": share(said, ~labels),
        "false_negative_rate": share(~said, labels),
    }


def _write_calibration(folder: Path, report: dict[str, Any]) -> None:
    if not dist.is_main():
        return
    for place in (folder, folder / "model"):
        (place / "calibration.json").write_text(json.dumps(report, indent=1))
    shown = {
        name: rate
        for name, rate in report.items()
        if isinstance(rate, dict) and rate["value"] is not None
    }
    print(f"held-out rows: {report['num']}, threshold {report['threshold']}")
    for name, rate in shown.items():
        print(
            f"  {name.replace('_', ' '):<20} {rate['value']:.3f}   95 % interval {rate['low']:.3f} to {rate['high']:.3f}"
        )
