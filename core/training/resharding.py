"""Checkpoints of another number of ranks or another ZeRO stage, by DeepSpeed's universal format."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import dist


class Layout(NamedTuple):
    """How a checkpoint's states are divided."""

    sharded: str
    """What is sharded: "nothing", "states" (ZeRO stages 1 and 2) or "parameters" (stage 3)."""
    num_ranks: int
    """Ranks that share it; 1 where nothing is sharded."""

    @classmethod
    def of_engine(cls, zero_stage: int) -> Layout:
        """The layout that an engine of this run writes and reads."""
        sharded = ("nothing", "states", "states", "parameters")[zero_stage]
        return cls(sharded, dist.world_size() if zero_stage else 1)

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Layout:
        """The layout of the files that an engine has written."""
        num_ranks = len(list(folder.glob("*zero_pp_rank_*_optim_states.pt")))
        if not num_ranks:
            return cls("nothing", 1)
        stage_3 = any(folder.glob("zero_pp_rank_*_model_states.pt"))
        return cls("parameters" if stage_3 else "states", num_ranks)


def load_resharded(
    engine: Any,
    checkpoint: Path,
    found: Layout,
    own: Layout,
    *,
    convert: Callable[[Namespace], None],
) -> None:
    """Loads weights and optimizer states that were divided in another way.

    Args:
        engine: DeepSpeed's engine.
        checkpoint: folder that an engine has written.
        found: the checkpoint's layout.
        own: the engine's layout.
        convert: DeepSpeed's converter.

    Raises:
        ValueError: one of them shards nothing, or the checkpoint cannot be converted.
    """
    if "nothing" in (found.sharded, own.sharded):
        raise ValueError(
            f"checkpoint {checkpoint}: has {found.sharded} sharded, but zero_stage="
            f"{engine.zero_optimization_stage()} has {own.sharded}: set the zero_stage of the "
            "earlier run"
        )
    if dist.is_main():
        print(
            f"checkpoint {checkpoint}: of {found.num_ranks} ranks, {found.sharded} sharded: "
            f"converted for {own.num_ranks} ranks, {own.sharded} sharded"
        )
    shapes = {
        name: getattr(parameter, "ds_shape", parameter.shape)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    settings = engine._config  # its only switch between the two formats
    with universal(checkpoint, shapes, convert) as folder:
        settings.load_universal_checkpoint = True
        try:
            engine.load_checkpoint(str(folder.parent), tag=folder.name)
        finally:
            settings.load_universal_checkpoint = False
    # stage 3 gives all groups the settings of the first, and all states one count of steps
    for group, decay in zip(engine.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = state["step"].clone()


@contextlib.contextmanager
def universal(
    checkpoint: Path,
    shapes: Mapping[str, torch.Size],
    convert: Callable[[Namespace], None],
) -> Iterator[Path]:
    """Converts an engine's checkpoint to the universal format, in a folder that is removed later.

    Every rank must call it, with a folder that all ranks can read. Rank 0 converts, and reads the
    file of one rank at a time.

    Args:
        checkpoint: folder that an engine has written.
        shapes: shapes of the trained parameters, by name.
        convert: DeepSpeed's converter.

    Raises:
        ValueError: it cannot be converted.
    """
    temporary = checkpoint.parent.parent / f".writing-universal-{checkpoint.name}"
    target = temporary / "universal"  # beside it the converter writes a pointer
    problem = None
    try:
        if dist.is_main():
            shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
            try:
                _convert(convert, checkpoint, target)
                _make_uniform(target, shapes)
            except Exception as error:  # a damaged file raises errors of many types
                problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if problem := dist.broadcast(problem):
            raise ValueError(f"checkpoint {checkpoint}: cannot be converted: {problem}")
        yield target
        dist.barrier()  # until the last rank has read it
    finally:
        if dist.is_main():
            shutil.rmtree(temporary, ignore_errors=True)


def _convert(convert: Callable[[Namespace], None], checkpoint: Path, target: Path) -> None:
    """Runs DeepSpeed's converter, which prints much."""
    options = Namespace(
        input_folder=str(checkpoint),
        output_folder=str(target),
        num_extract_workers=1,  # in this process
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        convert(options)


def _make_uniform(folder: Path, shapes: Mapping[str, torch.Size]) -> None:
    """Gives a converted checkpoint what engines of all stages look for in it.

    The converter writes what an engine of the same stage reads: flat tensors and one count of steps
    for stage 3, shaped tensors and a count beside each for stages 1 and 2.
    """
    path = folder / "zero" / "optimizer_state.pt"
    state = torch.load(path, weights_only=False)
    steps = [*(folder / "zero").rglob("step.pt")]
    if steps:
        step = torch.load(steps[0], weights_only=False)
    else:
        step = state["optimizer_state_dict"]["state"][0]["step"]
    for key in ("fp32_flat_groups", "optimizer_state_dict"):
        state.pop(key, None)  # shards of rank 0
    groups = state["param_groups"]
    state["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": groups}
    state.setdefault("ds_version", importlib.metadata.version("deepspeed"))
    torch.save(state, path)
    for name, shape in shapes.items():
        own = folder / "zero" / name
        for file in (path for path in own.glob("*.pt") if path.stem != "step"):
            value = torch.load(file, weights_only=False)
            whole = value["param"] if isinstance(value, dict) else value
            torch.save({"param": whole.view(shape)}, file)
        torch.save(step, own / "step.pt")
    (model_states,) = sorted(folder.glob("*mp_rank_00_model_states.pt"))[:1]
    for prefix in ("", "zero_pp_rank_0_"):
        name = f"{prefix}mp_rank_00_model_states.pt"
        if not (folder / name).exists():
            (folder / name).symlink_to(model_states.name)
