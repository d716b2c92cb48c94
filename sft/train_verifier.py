"""Trains the two-class verifier that rewards PPO, and measures its error rates on held-out rows."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core.llm.judge import Judge, JudgedAnswer
from ..core.report.run_report import try_report
from ..core.report.statistics import wilson_interval
from ..core.text.data import Purpose
from ..core.text.verifier_text import load_template
from ..core.training import checkpoint, dist
from ..core.training.engine import TrainEngine
from ..core.training.packing import PackedBatch, pack_token_rows, share_out
from ..core.training.pretrained import check_embedding, load_classifier, load_tokenizer, save_model
from ..core.training.run import print_next_commands
from .config import VerifierTrainingConfig
from .finetune import train_and_eval_rows
from .train import Task, fit
from .verifier_examples import LabelledIds, load_answers, tokenise

LABELS = ("wrong", "right")
"""Names of the two classes in the exported config.json."""
NUM_BINS = 10
"""Bins of the reliability curve, and thresholds at which error rates are reported."""


def train(config: VerifierTrainingConfig, *, resolved: dict[str, Any]) -> Path:
    """Trains the verifier to its end, resuming from the newest checkpoint if there is one.

    Writes model/ with calibration.json beside its weights.

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
        load = partial(_load, config, folder, tokenizer)
        rows, eval_rows = train_and_eval_rows(
            config, load, length=lambda row: len(row.token_ids), group=lambda row: row.row
        )
        module = load_classifier(config.model, dtype=config.dtype, fresh_head=True)
        module.hf.config.id2label = dict(enumerate(LABELS))
        module.hf.config.label2id = {label: number for number, label in enumerate(LABELS)}
        check_embedding(module.hf.config, tokenizer, config.model)
        engine = TrainEngine(module, config.engine)
        task = _task(config, tokenizer)
        try:
            fit(config, task, engine, rows, eval_rows, folder, resolved=resolved)
            if eval_rows:
                p = probabilities(engine, eval_rows, config.max_tokens_per_gpu)
                labels = torch.tensor([row.label for row in eval_rows])
                _write_calibration(folder, calibration(p, labels, config.threshold))
        finally:
            if dist.is_main():
                try_report(folder, title="Verifier training", classifier=True)
        print_next_commands(folder, _next_command(config))
        return folder


def _next_command(config: VerifierTrainingConfig) -> str:
    options = "--verifier.model MODEL"
    if config.threshold != VerifierTrainingConfig.threshold:
        options += f" --verifier.threshold {config.threshold}"
    if config.template:
        options += f" --verifier.template {shlex.quote(config.template)}"
    return (
        f"verippo ppo --policy runs/sft/model {options} --data problems.json --steps 100 "
        "--output runs/ppo"
    )


def _load(
    config: VerifierTrainingConfig,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    sources: str,
    *,
    purpose: Purpose = "train",
) -> list[LabelledIds]:
    """Loads, labels and tokenises the rows of some sources, and prints how many of each kind."""
    template = load_template(config.template)
    answers, kinds = load_answers(
        sources,
        limit=config.limit,
        purpose=purpose,
        seed=config.seed,
        wrong_per_question=config.wrong_per_question,
        columns=config.columns,
        judge=partial(_judge, config, folder) if config.llm.model else None,
    )
    rows, num_cut = tokenise(answers, tokenizer, template=template, max_tokens=config.max_seq_len)
    if dist.is_main():
        found = ", ".join(f"{count} {kind} rows" for kind, count in kinds.items())
        num_right = sum(row.label for row in rows)
        cut = f"{num_cut} cut to max_seq_len={config.max_seq_len}"
        print(f"{sources}: {found} -> {len(rows)} answers, {num_right} right; {cut}")
    return rows


def _judge(
    config: VerifierTrainingConfig, folder: Path, cases: list[JudgedAnswer]
) -> list[bool | None]:
    """The LLM judge's verdicts, requested by the main rank, and the same on every rank."""
    verdicts: list[bool | None] = []
    if dist.is_main():
        judge = Judge(config.llm, journal=folder / "judge-journal.jsonl", seed=config.seed)
        verdicts = judge.verdicts(cases, progress="judge")
    return dist.broadcast(verdicts)


def _task(config: VerifierTrainingConfig, tokenizer: PreTrainedTokenizerBase) -> Task[LabelledIds]:
    def loss_sum(engine: TrainEngine, rows: Sequence[LabelledIds]) -> Tensor:
        logits = engine(packed(rows))
        if not rows:
            return logits.sum() * 0.0
        labels = torch.tensor([row.label for row in rows], device=logits.device)
        return F.cross_entropy(logits, labels, reduction="sum")

    def evaluate(engine: TrainEngine, rows: Sequence[LabelledIds]) -> dict[str, Any]:
        p = probabilities(engine, rows, config.max_tokens_per_gpu)
        labels = torch.tensor([row.label for row in rows])
        loss = F.binary_cross_entropy(p.clamp(1e-7, 1 - 1e-7), labels.double())
        accuracy = ((p > config.threshold) == labels.bool()).double().mean()
        return {"loss": float(loss), "accuracy": float(accuracy), "num": len(rows)}

    def export(engine: TrainEngine, folder: Path) -> None:
        weights = engine.full_state()
        if dist.is_main():
            save_model(folder, engine.module.hf, weights, tokenizer)

    return Task(
        length=lambda row: len(row.token_ids),
        weight=lambda row: 1,
        loss_sum=loss_sum,
        evaluate=evaluate,
        export=export,
    )


@torch.no_grad()
def probabilities(engine: TrainEngine, rows: Sequence[LabelledIds], max_tokens: int) -> Tensor:
    """P(right) of every row, each rank computing its share.

    Returns:
        [rows] float64 on the host, the same on every rank.
    """
    lengths = [len(row.token_ids) for row in rows]
    plan = share_out(
        lengths,
        max_tokens=max_tokens,
        rank=dist.rank(),
        world_size=dist.world_size(),
    )
    result = torch.zeros(len(rows), dtype=torch.float64, device=dist.device())
    for micro in plan:
        logits = engine(packed([rows[i] for i in micro]))
        if micro:
            result[micro] = logits.double().softmax(-1)[:, 1]
    return dist.all_sum(result).cpu()


def packed(rows: Sequence[LabelledIds]) -> PackedBatch:
    """The rows as one packed batch on this rank's device; without rows, a batch without loss."""
    return pack_token_rows([row.token_ids for row in rows]).to(dist.device())


def calibration(p: Tensor, labels: Tensor, threshold: float) -> dict[str, Any]:
    """Error rates and reliability of a verifier on held-out rows.

    Args:
        p: [rows], P(right) in 0..1.
        labels: [rows], 0 or 1.
        threshold: an answer counts as right above it.

    Returns:
        Rates at the threshold with 95 % Wilson intervals, `curve` (reliability in bins of P) and
        `thresholds` (rates at other thresholds), as written to calibration.json.
    """
    labels = labels.bool()
    report: dict[str, Any] = {"num": len(p), "threshold": threshold}
    report |= _rates(p > threshold, labels)
    bins = (p * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    report["curve"] = [_curve_point(p, labels, bins, b) for b in sorted(set(bins.tolist()))]
    names = ("accuracy", "false_positive_rate", "false_negative_rate")
    report["thresholds"] = []
    for t in range(1, NUM_BINS):
        rates = _rates(p > t / NUM_BINS, labels)
        values = {name: rates[name]["value"] for name in names}
        report["thresholds"].append({"threshold": t / NUM_BINS, **values})
    return report


def _curve_point(
    p: Tensor,
    labels: Tensor,
    bins: Tensor,
    number: int,
) -> dict[str, Any]:
    own = bins == number
    return {
        "bin_low": number / NUM_BINS,
        "bin_high": (number + 1) / NUM_BINS,
        "mean_predicted": float(p[own].mean()),
        "share_right": float(labels[own].double().mean()),
        "num": int(own.sum()),
    }


def _rates(predicted: Tensor, labels: Tensor) -> dict[str, dict[str, float | None]]:
    """Accuracy, precision, recall and error rates; both arguments are [rows] bool."""

    def share(hits: Tensor, of: Tensor) -> dict[str, float | None]:
        count = int((hits & of).sum())
        num = int(of.sum())
        if num == 0:
            return {"value": None, "low": None, "high": None}
        low, high = wilson_interval(count, num)
        return {"value": count / num, "low": low, "high": high}

    return {
        "accuracy": share(predicted == labels, torch.ones_like(labels)),
        "precision": share(labels, predicted),
        "recall": share(predicted, labels),
        "false_positive_rate": share(predicted, ~labels),
        "false_negative_rate": share(~predicted, labels),
    }


def _write_calibration(folder: Path, report: dict[str, Any]) -> None:
    if not dist.is_main():
        return
    for place in (folder, folder / "model"):
        (place / "calibration.json").write_text(json.dumps(report, indent=1))
    print(f"held-out rows: {report['num']}, threshold {report['threshold']}")
    for name, rate in report.items():
        if isinstance(rate, dict) and rate["value"] is not None:
            interval = f"{rate['low']:.3f} to {rate['high']:.3f}"
            label = name.replace("_", " ")
            print(f"  {label:<20} {rate['value']:.3f}   95 % interval {interval}")
