"""What a PPO run writes beside its checkpoints: policy, sampled texts, rollouts of a failure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..core.training import dist
from ..core.training.metrics import MetricLog
from ..core.training.pretrained import save_model
from ..core.training.run import RunState
from .config import VerifierConfig
from .rollout import Rollout
from .setup import Components
from .step_metrics import sample_row

NUM_LOGGED_SAMPLES = 4
"""Sampled texts written to samples.jsonl each time."""


def export_policy(parts: Components, folder: Path) -> None:
    """Writes the policy as a Hugging Face folder. Every rank must call it."""
    weights = parts.policy.full_state()
    if dist.is_main():
        save_model(
            folder,
            parts.policy.module.hf,
            weights,
            parts.tokenizer,
            stop_token_ids=parts.stop_token_ids,
        )


def write_samples(
    log: MetricLog,
    rollouts: Sequence[Rollout],
    scores: Tensor,
    verifier: VerifierConfig,
    *,
    needs_format: bool,
    step: int,
    split: str,
) -> None:
    """Writes the first rollouts with their scores to samples.jsonl; see `sample_row`."""
    first = list(zip(rollouts, scores.tolist(), strict=True))[:NUM_LOGGED_SAMPLES]
    for sampled, value in first:
        row = sample_row(
            sampled,
            value,
            verifier,
            needs_format=needs_format,
            step=step,
            split=split,
        )
        log.write_text("samples", row)


def save_rollouts(folder: Path, state: RunState, rollouts: Sequence[Rollout]) -> str:
    """Writes the rollouts of a step whose update failed; returns the file's path."""
    file = folder / f"rollouts-step-{state.step + 1}.json"
    if dist.is_main():
        rows = [vars(rollout) | {"problem": vars(rollout.problem)} for rollout in rollouts]
        file.write_text(json.dumps(rows))
    return str(file)
