"""The text of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from .plan_advice import MAX_GPUS
from .plan_config import MachineConfig, PPOPlanConfig
from .plan_memory import GIB, MemoryPlan, Part
from .plan_time import mean_lengths

if TYPE_CHECKING:
    from .plan import Plan

NAME_WIDTH = 46


def plan_text(plan: Plan) -> str:
    """Models, memory, time, smallest machine and advice, as printed on stdout."""
    config = plan.config
    nodes = -(-config.gpus // config.gpus_per_node)
    unit = "process" if config.device == "cpu" else "GPU"
    lines = [f"{config.gpus} x {unit} of {config.gpu_memory:g} GiB, {nodes} node(s)", ""]
    for role, shape in plan.shapes.items():
        lines.append(f"{role}: {shape.name}, {shape.parameters / 1e9:.2f} B parameters")
    lines += ["", *_memory_lines(plan.memory, unit), ""]
    lines += [*_time_lines(plan), "", *_verdict(plan)]
    return "\n".join(lines)


def _gib(number: float) -> str:
    return f"{number / GIB:9.2f}"


def _row(name: str, gpu: float, host: float, phase: str = "") -> str:
    shown = _gib(host) if host else " " * 9
    return f"{name:<{NAME_WIDTH}}{_gib(gpu)}  {shown}  {phase}".rstrip()


def _memory_lines(memory: MemoryPlan, unit: str) -> Iterator[str]:
    yield f"{'GiB':<{NAME_WIDTH}}{'a ' + unit:>9}  {'a host':>9}  phase"
    yield from (_row(part.name, part.gpu, part.host) for part in memory.parts if not part.phase)
    for phase, total in memory.phases.items():
        own = [part for part in memory.parts if part.phase == phase]
        yield from (_row(part.name, part.gpu, part.host, phase) for part in own)
        if any(part.gpu for part in own):
            yield _row(f"= in phase {phase}", total, 0.0)
    yield _row(f"peak, in phase {memory.peak_phase}", memory.gpu, memory.host)
    yield _row("limit, less the reserve", memory.gpu_limit, memory.host_limit)


def _time_lines(plan: Plan) -> Iterator[str]:
    yield f"{'a step':<{NAME_WIDTH}}{'seconds':>9}  {'TFLOP':>9}  GB exchanged by each GPU"
    for phase in plan.phases:
        flops = f"{phase.flops / 1e12:9.0f}" if phase.flops else " " * 9
        traffic = f"{phase.traffic / 1e9:.0f}" if phase.traffic else ""
        yield f"{phase.name:<{NAME_WIDTH}}{phase.seconds:9.1f}  {flops}  {traffic}".rstrip()
    total = sum(phase.seconds for phase in plan.phases)
    yield f"{'together':<{NAME_WIDTH}}{total:9.1f}"
    yield from _assumptions(plan)


def _assumptions(plan: Plan) -> Iterator[str]:
    config: MachineConfig = plan.config
    yield (
        f"assumed: {config.tflops:g} TFLOP/s x MFU {config.mfu:g}, memory "
        f"{config.memory_bandwidth:g} GB/s x {config.memory_efficiency:g}, links "
        f"{config.node_bandwidth:g} GB/s in a node and {config.network_bandwidth:g} between nodes"
    )
    if isinstance(plan.config, PPOPlanConfig):
        prompt, response = mean_lengths(plan.config)
        yield f"assumed: mean lengths of {prompt:g} prompt and {response:g} response tokens"
        yield f"steps: {plan.config.total_steps}, without evaluations and checkpoints"


def _verdict(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    if plan.server_tokens is not None:
        held = f"a server's key-value cache holds {max(0, plan.server_tokens):,} tokens"
        yield held if plan.server_tokens > 0 else f"{held}: raise server_tp or server_mem_fraction"
    if memory.fits:
        yield f"fits: {_share(memory.gpu, memory.gpu_limit)} of the GPU memory that may be used"
    else:
        lacking = [
            f"{(used - limit) / GIB:.1f} GiB a {what}"
            for what, used, limit in (
                ("GPU", memory.gpu, memory.gpu_limit),
                ("host", memory.host, memory.host_limit),
            )
            if used > limit
        ]
        yield f"does not fit: lacks {' and '.join(lacking)}; {_largest(memory.parts)}"
        if plan.changes:
            yield f"change first: {', then '.join(plan.changes)}; {_needed(plan)}"
    number = "none" if plan.smallest is None else f"{plan.smallest} such GPUs"
    yield f"smallest machine for these settings (up to {MAX_GPUS} GPUs): {number}"


def _needed(plan: Plan) -> str:
    """What the run needs with the changes."""
    needed = plan.smallest_changed
    if needed is None:
        return f"even {MAX_GPUS} GPUs are not enough then"
    enough = needed <= plan.config.gpus
    return "it then fits" if enough else f"it then needs {needed} GPUs"


def _share(used: float, limit: float) -> str:
    return f"{used / limit:.0%}"


def _largest(parts: Iterable[Part]) -> str:
    largest = max(parts, key=lambda part: part.gpu)
    return f"the largest part is {largest.name}"
