"""What all benches share: the machine's facts and limits, time and memory of a call."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ...core.training import dist
from ...core.training.metrics import environment

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Data types by the names that options have."""
COPY_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""Bytes copied to measure the bandwidth: more than a cache holds."""
GEMM_SIZE = {"cpu": 512, "cuda": 8192}
"""Rows and columns of the matrices that are multiplied to measure the rate."""


class Cost(NamedTuple):
    """Time and memory of a call."""

    seconds: float
    """Median of the wall times."""
    fastest: float
    """Shortest wall time."""
    cpu_seconds: float
    """Median of this process's CPU times; far less than `seconds` on a busy machine."""
    extra_bytes: int | None
    """Peak memory of the first call, above what was in use before it; None if unknown."""


def measure(call: Callable[[], object], *, repeats: int) -> Cost:
    """Calls a function once for its memory, then `repeats` times for its time."""
    extra = _extra_bytes(call)
    runs = []
    for _ in range(repeats):
        start = time.perf_counter()
        cpu_start = time.process_time()
        call()
        _synchronise()
        runs.append((time.perf_counter() - start, time.process_time() - cpu_start))
    seconds, cpu_seconds = zip(*runs, strict=True)
    return Cost(
        seconds=statistics.median(seconds),
        fastest=min(seconds),
        cpu_seconds=statistics.median(cpu_seconds),
        extra_bytes=extra,
    )


def _extra_bytes(call: Callable[[], object]) -> int | None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        _synchronise()
        return torch.cuda.max_memory_allocated() - before
    known = False
    with suppress(OSError):  # Linux alone resets the peak
        Path("/proc/self/clear_refs").write_text("5")
        known = True
    before = _status_bytes("VmRSS") if known else 0
    call()
    return max(0, _status_bytes("VmHWM") - before) if known else None


def _status_bytes(name: str) -> int:
    """A size of this process as Linux reports it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Machine:
    """The machine's limits, and the facts that stand in each row.

    Limits are the fastest of many short runs, some of which other programs leave alone.
    """

    def __init__(self, *, dtype: torch.dtype = torch.float32, repeats: int = 30) -> None:
        """Measures; `dtype` is that of the products."""
        device = dist.device()
        size = COPY_BYTES[device.type]
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.ones_like(source)
        copying = measure(lambda: target.copy_(source), repeats=repeats)
        self.bandwidth = 2 * size / copying.fastest
        """Bytes read and written per second, by a copy."""
        size = GEMM_SIZE[device.type]
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        product = measure(lambda: a @ b, repeats=repeats)
        self.flops = 2 * size**3 / product.fastest
        """Operations per second of a product of square matrices."""
        self.facts = environment(1) | {
            "numpy": np.__version__,
            "threads": torch.get_num_threads(),
            "bandwidth_gb_per_second": round(self.bandwidth / 1e9, 2),
            "gemm_gflops_per_second": round(self.flops / 1e9, 1),
            "gemm_dtype": str(dtype).removeprefix("torch."),
        }

    def print_cost(
        self,
        figure: str,
        cost: Cost,
        *,
        tokens: int,
        moved_bytes: float = 0.0,
        operations: float = 0.0,
        **facts: Any,
    ) -> None:
        """Prints a cost beside its limit as one JSON object.

        Args:
            figure: what was measured.
            cost: its cost.
            tokens: tokens that it was measured on.
            moved_bytes: bytes that must be read and written at least.
            operations: floating-point operations that are needed at least.
            facts: sizes and names.
        """
        limit = max(moved_bytes / self.bandwidth, operations / self.flops)
        extra = None if cost.extra_bytes is None else round(cost.extra_bytes / tokens, 2)
        row = {
            "figure": figure,
            **facts,
            "tokens": tokens,
            "seconds": _rounded(cost.seconds),
            "cpu_seconds": _rounded(cost.cpu_seconds),
            "limit_seconds": _rounded(limit),
            "bytes_per_token": extra,
            "moved_bytes": round(moved_bytes),
            "operations": round(operations),
        }
        print_row(row | load() | self.facts)


def load() -> dict[str, float]:
    """The machine's load: other programs distort a busy machine's figures."""
    return {"load": round(os.getloadavg()[0], 2)}


def print_row(row: dict[str, Any]) -> None:
    """Prints a figure with the facts about its machine as one JSON object."""
    print(json.dumps(row), flush=True)


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")
