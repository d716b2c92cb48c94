"""`verippo plan`: memory, operations and time of a run, from configurations alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, PretrainedConfig

from ..core.files import is_path, replace_file
from ..core.planning.model_shape import ModelShape, model_shape
from ..core.training.pretrained import load_config
from .plan_advice import MAX_GPUS, first_changes, smallest_machine
from .plan_config import MachineConfig, PlanConfig, PPOPlanConfig
from .plan_memory import MemoryPlan, memory_plan, server_cache_tokens
from .plan_table import plan_text
from .plan_time import Phase, time_plan

ARCHITECTURES = Path(__file__).with_name("architectures.yaml")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that the command finds out."""

    config: PlanConfig
    shapes: dict[str, ModelShape]
    memory: MemoryPlan
    phases: tuple[Phase, ...]
    smallest: int | None
    """Smallest number of GPUs on which the run fits; None: more than MAX_GPUS."""
    changes: list[str]
    """What to change first where the run does not fit."""
    smallest_changed: int | None
    """Smallest number of GPUs with these changes."""
    server_tokens: int | None = None
    """Tokens that the key-value cache of each server holds."""


def plan(config: PlanConfig, *, resolved: dict[str, Any]) -> None:
    """Runs the command `plan`: prints the plan, and writes it as JSON if that is asked for.

    Args:
        config: the run and the machine.
        resolved: the configuration as plain values.

    Raises:
        ValueError: the sizes of a model are not at hand.
    """
    result = make_plan(config)
    row = json.dumps(plan_row(result, resolved))
    if config.json == "-":
        print(row)
        return
    print(plan_text(result))
    if config.json:
        replace_file(Path(config.json).expanduser(), row + "\n")


def make_plan(config: PlanConfig) -> Plan:
    """Plans a run.

    Raises:
        ValueError: the sizes of a model are not at hand.
    """
    shapes = {role: _shape(name, config.model_configs) for role, name in _models(config).items()}
    memory = memory_plan(config, shapes)
    changes, changed = first_changes(config, shapes, memory)
    server_tokens = None
    if isinstance(config, PPOPlanConfig) and config.sampler.kind == "sglang":
        server_tokens = server_cache_tokens(config, shapes["policy"])
    return Plan(
        config=config,
        shapes=shapes,
        memory=memory,
        phases=time_plan(config, shapes),
        smallest=smallest_machine(config, shapes),
        changes=changes,
        smallest_changed=smallest_machine(changed, shapes),
        server_tokens=server_tokens,
    )


def plan_row(result: Plan, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The plan as plain values; sizes in bytes."""
    memory = result.memory
    machine = [field.name for field in dataclasses.fields(MachineConfig)]
    return {
        "machine": {name: resolved[name] for name in machine},
        "models": {role: dataclasses.asdict(shape) for role, shape in result.shapes.items()},
        "parts": [dataclasses.asdict(part) for part in memory.parts],
        "gpu_bytes": memory.gpu,
        "gpu_bytes_by_phase": memory.phases,
        "host_bytes": memory.host,
        "peak_phase": memory.peak_phase,
        "fits": memory.fits,
        "smallest_gpus": result.smallest,
        "max_gpus": MAX_GPUS,
        "change_first": result.changes,
        "smallest_gpus_changed": result.smallest_changed,
        "server_tokens": result.server_tokens,
        "phases": [dataclasses.asdict(phase) for phase in result.phases],
        "seconds_per_step": sum(phase.seconds for phase in result.phases),
    }


def _models(config: PlanConfig) -> dict[str, str]:
    """The models of a run: role -> folder or hub id."""
    if not isinstance(config, PPOPlanConfig):
        return {"model": config.model}
    models = {"policy": config.policy, "reference": config.reference or config.policy}
    if config.advantage == "gae":
        models["critic"] = config.critic or config.policy
    if config.verifier.kind == "classifier":
        models["verifier"] = str(config.verifier.model)
    return models


@cache
def _shape(name: str, model_configs: str | None) -> ModelShape:
    return model_shape(find_config(name, model_configs), name)


def find_config(name: str, model_configs: str | None = None) -> PretrainedConfig:
    """Finds the configuration of a model: in a folder, in architectures.yaml, or on the hub.

    Args:
        name: folder or hub id.
        model_configs: folder with NAME/config.json, which comes first.

    Raises:
        ValueError: it is in none of them.
    """
    if model_configs:
        folder = Path(model_configs).expanduser() / name
        if (folder / "config.json").is_file():
            return load_config(str(folder))
    if Path(name).is_dir():
        return load_config(name)
    known = yaml.safe_load(ARCHITECTURES.read_text(encoding="utf-8"))
    if name in known:
        return AutoConfig.for_model(**known[name])
    try:
        if is_path(name):
            raise ValueError("no such folder")
        return load_config(name)
    except ValueError:
        raise ValueError(
            f"model {name}: its config.json is not at hand: give in its place a folder that holds "
            "one or the hub id of a model of its size, or --model_configs DIR with "
            f"DIR/{name}/config.json"
        ) from None
