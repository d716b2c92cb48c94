"""Checks of the output folder: whether it can be written, and has space for what the run keeps."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from ...core.training.run_config import RunConfig
from ...rl.config import PPOConfig
from .findings import Caution, Report
from .models import num_parameters, roles

GIB = 2**30
TRAINED = ("policy", "critic", "model")
MARGIN = 1.2
"""Share of the needed space under which there is a warning."""


def needed_bytes(config: RunConfig, parameters: Mapping[str, int]) -> dict[str, int]:
    """Bytes on disk that a run needs at most, by purpose.

    A checkpoint holds, for each parameter of a trained model, two fp32 moments, the fp32 master
    weight except in fp32 without ZeRO, and the weight itself except under ZeRO-3.
    `save_total_limit` checkpoints are kept, the best one, and one that is being written.

    Args:
        config: the run's configuration.
        parameters: number of parameters by role.
    """
    size = 2 if config.dtype == "bf16" else 4
    master = 0 if config.dtype == "fp32" and config.zero_stage == 0 else 4
    trained = {role: num for role, num in parameters.items() if role in TRAINED}
    weight = 0 if config.zero_stage == 3 else size
    checkpoint = sum(trained.values()) * (weight + master + 8)
    evaluates = bool(config.eval_data or config.eval_fraction)
    exported = parameters.get("policy", parameters.get("model", 0)) * size
    needed = {
        "checkpoints": checkpoint * (config.save_total_limit + 1 + evaluates),
        "exported models": exported * (1 + evaluates),
    }
    if isinstance(config, PPOConfig):
        if config.reference_refresh_steps:
            reference = parameters.get("reference", parameters["policy"]) * size
            needed["checkpoints"] += reference * (config.save_total_limit + 1 + evaluates)
        if config.sampler.kind == "sglang" and config.sampler.sync == "disk":
            needed["weights for the servers"] = exported
    return needed


def check_disk(report: Report, config: RunConfig, problem: str | None) -> None:
    """Checks the output folder.

    Args:
        report: receives the findings.
        config: the run's configuration.
        problem: why the folder cannot be written, if it cannot.
    """
    report.group = "disk"
    if problem:
        report.add("FAILED", "output", problem)
    else:
        report.add("ok", "output", f"{config.output} can be written")
    report.check("space", lambda: _space(config))


def _space(config: RunConfig) -> str:
    folder = Path(config.output).expanduser()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    parameters = {role.name: num_parameters(role) for role in roles(config)}
    needed = needed_bytes(config, parameters)
    parts = ", ".join(f"{name} {amount / GIB:.2f}" for name, amount in needed.items())
    # an earlier start's files are replaced
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    lacking = max(0, sum(needed.values()) - present)
    free = shutil.disk_usage(existing).free
    text = f"{free / GIB:.1f} GiB free in {existing}, {lacking / GIB:.2f} GiB needed ({parts})"
    if free < lacking:
        raise ValueError(f"{text}: free some, or lower save_total_limit={config.save_total_limit}")
    if free < MARGIN * lacking:
        raise Caution(f"{text}: little is left for logs and other runs")
    return text
