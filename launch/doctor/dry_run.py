"""Two steps of a run with small random models on CPU, in processes of their own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ...core.llm.config import LLMConfig
from ...core.sampling.sampler import SamplingParams
from ...core.text.data import Row, load_rows
from ...core.training.run_config import RunConfig
from ...rl.config import PPOConfig, SamplerConfig
from ...sft.config import TrainingConfig, VerifierTrainingConfig
from .config import DoctorOptions
from .models import Role, roles
from .small_model import write_small_model

NUM_ROWS = 8
NUM_HELD_OUT = 2
NEW_TOKENS = 8
SECONDS = 600
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def dry_run(config: RunConfig) -> str:
    """Runs the first step, and resumes for the second; everything it writes is removed.

    Returns:
        What was run.

    Raises:
        ValueError: a model or the data cannot be read, or the run failed.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="verippo-dry-run-") as name:
        folder = Path(name)
        small, notes = small_run(config, folder)
        for steps in (1, 2):
            _run(small, folder, steps=steps)
        rows = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        done = [json.loads(row)["step"] for row in rows]
        if done != [1, 2] or not (folder / "run" / "model" / "config.json").exists():
            raise ValueError(f"dry run: its metrics have the steps {done}, expected 1 and 2")
    seconds = time.monotonic() - start
    said = "".join(f"; {note}" for note in notes)
    return f"2 steps on CPU in fp32, resumed after the first, in {seconds:.0f} s{said}"


def small_run(config: RunConfig, folder: Path) -> tuple[RunConfig, list[str]]:
    """The configuration of the small run, whose models and data are written to `folder`.

    Returns:
        The configuration, and what it replaces other than sizes.
    """
    notes: list[str] = []
    models = {role.name: _write_model(role, config, folder / role.name) for role in roles(config)}
    train, held_out = _rows(config, notes)
    shared: dict[str, Any] = {
        "data": _write(folder / "train.json", train),
        "output": str(folder / "run"),
        "eval_fraction": 0.0,
        "eval_every": 1,
        "save_every": 1,
        "log_to": "jsonl",
        "resume": "auto",
        "dtype": "fp32",
        "offload": "none",
        "offline": True,
    }
    if config.eval_data or config.eval_fraction:
        shared["eval_data"] = _write(folder / "held_out.json", held_out)
    if config.offload != "none":
        notes.append(f"without offload={config.offload}")
    if isinstance(config, PPOConfig):
        return dataclasses.replace(config, **shared, **_ppo_fields(config, models, notes)), notes
    assert isinstance(config, TrainingConfig)
    fields: dict[str, Any] = {"model": models["model"], "batch_size": 2, "stop_at_loss": None}
    if isinstance(config, VerifierTrainingConfig):
        fields["llm"] = LLMConfig()
    return dataclasses.replace(config, max_steps=1, **shared, **fields), notes


def _ppo_fields(config: PPOConfig, models: dict[str, str], notes: list[str]) -> dict[str, Any]:
    verifier = config.verifier
    if verifier.kind == "judge":
        verifier = dataclasses.replace(verifier, kind="exact")
        notes.append("exact answers in place of the LLM judge")
    elif verifier.kind == "classifier":
        verifier = dataclasses.replace(verifier, model=models["verifier"])
    if config.sampler.kind != "local":
        notes.append(f"the local sampler in place of {config.sampler.kind}")
    own_critic = config.critic and config.critic != "verifier"
    tokens = min(NEW_TOKENS, config.sampling.max_new_tokens)
    return {
        "policy": models["policy"],
        "critic": models.get("critic") if own_critic else config.critic,
        "reference": models.get("reference"),
        "baseline": models.get("baseline", models["policy"] if config.baseline else None),
        "verifier": verifier,
        "llm": LLMConfig(),
        "sampler": SamplerConfig(),
        "sampling": SamplingParams(
            temperature=config.sampling.temperature,
            max_new_tokens=tokens,
        ),
        "steps": 1,
        "episodes": None,
        "prompts_per_step": 2,
        "samples_per_prompt": min(2, config.samples_per_prompt),
        "minibatches": min(2, config.minibatches),
        "epochs": min(2, config.epochs),
        "critic_epochs": config.critic_epochs and min(2, config.critic_epochs),
        "critic_warmup_steps": 0,
        "refill_groups": min(1, config.refill_groups),
        "reference_refresh_steps": config.reference_refresh_steps and 1,
        "overlong_buffer": config.overlong_buffer and min(tokens, config.overlong_buffer),
        "stop_below_baseline": False,
    }


def _write_model(role: Role, config: RunConfig, folder: Path) -> str:
    classes = {"classifier": 2, "critic": 1}.get(role.kind)
    if role.kind == "critic" and not (
        isinstance(config, PPOConfig) and config.critic_head == "kept"
    ):
        classes = None  # its head is fresh
    auto = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    return write_small_model(role.path, folder, auto, num_labels=classes)


def _rows(config: RunConfig, notes: list[str]) -> tuple[list[Row], list[Row]]:
    """The shortest rows of the data: to train on, and held out."""
    if isinstance(config, VerifierTrainingConfig) and config.llm.model:
        notes.append("made-up answers in place of those that the LLM labels")
        columns = config.columns
        rows: list[Row] = [
            {columns.response: f"It is {n}.", columns.reference: str(n), columns.label: n % 2 == 0}
            for n in range(NUM_ROWS + NUM_HELD_OUT)
        ]
    else:
        rows = sorted(load_rows(config.data, limit=config.limit), key=_length)
    return rows[:NUM_ROWS], rows[NUM_ROWS:][:NUM_HELD_OUT] or rows[:NUM_HELD_OUT]


def _length(row: Row) -> int:
    return len(json.dumps(row, default=str))


def _write(path: Path, rows: Sequence[Row]) -> str:
    path.write_text(json.dumps(rows, default=str))
    return str(path)


def _run(config: RunConfig, folder: Path, *, steps: int) -> None:
    """Runs the stage up to a step."""
    own = {field.name for field in dataclasses.fields(DoctorOptions)}
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in own}
    values["steps" if isinstance(config, PPOConfig) else "max_steps"] = steps
    file = folder / f"run-{steps}.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    if isinstance(config, PPOConfig):
        stage = "ppo"
    else:
        stage = "verifier" if isinstance(config, VerifierTrainingConfig) else "sft"
    command = [sys.executable, "-m", "verippo.launch.cli", stage, "--config", str(file)]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(("SLURM_", "TORCHELASTIC_"))
    }
    environment |= {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"dry run: no end of step {steps} within {SECONDS} s") from None
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        last = said[-1] if said else "nothing was printed"
        raise ValueError(f"dry run: step {steps} ended with status {done.returncode}: {last}")
    if steps > 1 and f"resuming after step {steps - 1} of {steps}" not in done.stdout:
        raise ValueError(f"dry run: step {steps} did not resume from the checkpoint")
