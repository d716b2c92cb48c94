"""A run's records: metrics to JSONL, TensorBoard and wandb, sampled texts, and the environment."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from ..files import read_yaml, replace_file
from ..messages import mask_credentials

LOGGERS = ("jsonl", "tensorboard", "wandb")
FILES = ("metrics", "eval", "samples")


def parse_loggers(log_to: str) -> list[str]:
    """The loggers of a comma-separated list.

    Raises:
        ValueError: a logger is unknown.
    """
    names = [name.strip() for name in log_to.split(",") if name.strip()]
    for name in names:
        if name not in LOGGERS:
            raise ValueError(
                f"log_to={log_to!r}: unknown logger {name!r}; known are {', '.join(LOGGERS)}"
            )
    return names


class MetricLog:
    """Appends one object per step to NAME.jsonl, and its numbers to TensorBoard and wandb.

    The JSONL file is always written: resume, the report and people read it. On resume, rows after
    `first_step`, the step of the checkpoint, are dropped so that no step occurs twice.
    """

    def __init__(
        self,
        folder: Path,
        *,
        loggers: list[str],
        first_step: int,
        config: dict[str, Any],
        run_id: str | None,
    ):
        self.folder = folder
        self.run_id = run_id
        for file in (folder / f"{name}.jsonl" for name in FILES):
            if file.exists():
                # without a checkpoint the evaluation of step 0 is repeated too
                _drop_rows_after(file, first_step or -1)
        self._tensorboard = self._wandb = None
        if "tensorboard" in loggers:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(folder / "tensorboard"), purge_step=first_step + 1
            )
        if "wandb" in loggers:
            try:
                import wandb
            except ImportError:
                raise ValueError(
                    "log_to has wandb but it is not installed: pip install 'verippo[wandb]'"
                ) from None
            self._wandb = wandb.init(
                dir=str(folder),
                id=run_id,
                resume="allow",
                config=config,
            )
            self.run_id = self._wandb.id

    def write(
        self,
        name: str,
        row: dict[str, Any],
        *,
        prefix: str = "",
    ) -> None:
        """Appends a row, which has a `step`, to NAME.jsonl; its numbers go to the other loggers."""
        self.write_text(name, row)
        numbers = {
            prefix + key: value
            for key, value in row.items()
            if isinstance(value, (int, float)) and key != "step"
        }
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, row["step"])
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])

    def write_text(self, name: str, row: dict[str, Any]) -> None:
        """Appends a row to NAME.jsonl alone."""
        with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def close(self) -> None:
        """Flushes and closes the other loggers."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def start_log(
    folder: Path,
    *,
    log_to: str,
    step: int,
    total_steps: int,
    config: dict[str, Any],
    world_size: int,
    run_id: str | None,
) -> MetricLog:
    """Opens a run's log, and writes config.yaml and environment.json.

    When the run resumes, prints the step and the settings that changed since the last start.
    """
    record = folder / "config.yaml"
    if step > 0:
        before = _flat(_settings(record))
        now = _flat(config)
        changed = [
            f"{name} {before[name]} -> {now[name]}"
            for name in now
            if name in before and before[name] != now[name]
        ]
        print(f"resuming after step {step} of {total_steps} (use another --output to start over)")
        if changed:
            print(f"changed since the last start: {', '.join(changed)}")
    record.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(environment(world_size), indent=1))
    return MetricLog(
        folder,
        loggers=parse_loggers(log_to),
        first_step=step,
        config=config,
        run_id=run_id,
    )


def _settings(record: Path) -> dict[str, Any]:
    try:
        return read_yaml(record, name="settings")
    except ValueError:  # never written, or cut off by a kill
        return {}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        flat |= _flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return flat


def _drop_rows_after(file: Path, step: int) -> None:
    kept = []
    # a kill may cut a character; splitlines would also split at U+2028, which JSON keeps as it is
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
            keep = row.get("step", step) <= step
        except (ValueError, RecursionError, AttributeError, TypeError):
            continue  # cut off by a kill, or damaged otherwise; its step is repeated
        if keep:
            kept.append(line + "\n")
    replace_file(file, "".join(kept))


class Stopwatch:
    """Adds up the seconds of named phases: `with watch("rollout"): ...`."""

    def __init__(self, on_enter: Callable[[str], None] = lambda phase: None) -> None:
        """`on_enter` is called with the name of each phase that begins."""
        self.on_enter = on_enter
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.on_enter(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The seconds of each phase since the last call, as `seconds_<phase>`."""
        taken = {f"seconds_{phase}": seconds for phase, seconds in self.seconds.items()}
        self.seconds = {}
        return taken


def peak_memory_gib() -> float:
    """Peak memory of this process in GiB: GPU memory if there is a GPU, else resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def environment(world_size: int) -> dict[str, Any]:
    """Machine and package versions, for environment.json."""
    import psutil
    import torch

    facts: dict[str, Any] = {
        "command": mask_credentials(" ".join(sys.argv)),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "world_size": world_size,
    }
    for package in ("torch", "transformers", "deepspeed", "flash-attn", "sglang", "verippo"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """The row with NaN and infinity as null, which JSON cannot express."""
    import math

    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
