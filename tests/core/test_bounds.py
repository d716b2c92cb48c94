from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from verippo.core.bounds import Bounds, CountingInt, PositiveFloat, SeedInt, UnitFloat, check_bounds


@dataclass
class Settings:
    count: CountingInt = 1
    rate: PositiveFloat | None = None
    share: UnitFloat = 0.5
    seed: SeedInt = 0
    free: float = 0.0
    over: Annotated[float, Bounds(low=1, low_excluded=True, rule="must be above 1")] = 2.0
    stage: Literal[0, 1] = 0
    flag: bool = True
    either: float | str = "auto"
    name: str = "x"


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rate": 0.1},
        {"share": 0},
        {"share": 1},
        {"seed": 2**63 - 1},
        {"free": -5},
        {"either": 2},
    ],
)
def test_values_within_their_bounds_are_accepted(values):
    check_bounds(Settings(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count=0: must be at least 1"),
        ({"count": True}, "count=True: must be a number"),
        ({"rate": 0.0}, "rate=0.0: must be above 0"),
        ({"rate": math.inf}, "rate=inf: must be above 0"),
        ({"share": 1.5}, r"share=1.5: must lie in 0..1"),
        ({"share": math.nan}, r"share=nan: must lie in 0..1"),
        ({"seed": 2**63}, r"must be 0 or more and under 2\*\*63"),
        ({"free": -math.inf}, "free=-inf: must be finite"),
        ({"free": False}, "free=False: must be a number"),
        ({"over": 1.0}, "over=1.0: must be above 1"),
        ({"either": math.nan}, "either=nan: must be finite"),
    ],
)
def test_values_off_their_bounds_are_refused_by_field_and_rule(values, message):
    with pytest.raises(ValueError, match=message):
        check_bounds(Settings(**values))


def test_the_prefix_of_a_nested_configuration_is_named():
    with pytest.raises(ValueError, match=r"^sampling\.count=0: must be at least 1$"):
        check_bounds(Settings(count=0), prefix="sampling.")
