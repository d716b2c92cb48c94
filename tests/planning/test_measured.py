"""The plan's memory against that of real runs: pytest -m slow tests/planning."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
measure_memory = importlib.import_module("measure_memory")


@pytest.mark.slow
@pytest.mark.parametrize("case", measure_memory.CASES, ids=lambda case: case.name)
def test_planned_memory_is_within_15_percent_of_the_measured(case):
    measured, planned = measure_memory.measure(case)
    print(f"measured {measured / 2**20:.0f} MiB, planned {planned / 2**20:.0f} MiB")
    assert planned == pytest.approx(measured, rel=0.15)
