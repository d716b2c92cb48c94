"""Number types with bounds for the fields of a configuration, and the check that applies them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Bounds:
    """Metadata of a number type: which values are allowed."""

    low: float = -math.inf
    high: float = math.inf
    low_excluded: bool = False
    high_excluded: bool = False
    rule: str = "must be finite"
    """The rule as an error message states it."""

    def allow(self, value: float) -> bool:
        """Whether the value is finite and lies within the bounds."""
        above = value > self.low if self.low_excluded else value >= self.low
        below = value < self.high if self.high_excluded else value <= self.high
        return math.isfinite(value) and above and below


_POSITIVE = Bounds(low=0, low_excluded=True, rule="must be above 0")
_NON_NEGATIVE = Bounds(low=0, rule="must be 0 or more")

CountingInt = Annotated[int, Bounds(low=1, rule="must be at least 1")]
PositiveInt = Annotated[int, _POSITIVE]
NonNegativeInt = Annotated[int, _NON_NEGATIVE]
PositiveFloat = Annotated[float, _POSITIVE]
NonNegativeFloat = Annotated[float, _NON_NEGATIVE]
UnitFloat = Annotated[float, Bounds(low=0, high=1, rule="must lie in 0..1")]
ShareFloat = Annotated[
    float,
    Bounds(
        low=0,
        high=1,
        high_excluded=True,
        rule="must lie in 0..1",
    ),
]
"""A share of rows to hold out: 0 or more and under 1."""
ClipFloat = Annotated[
    float,
    Bounds(
        low=0,
        high=1,
        low_excluded=True,
        rule="must be above 0 and at most 1",
    ),
]
UnderOneFloat = Annotated[
    float,
    Bounds(
        low=0,
        high=1,
        high_excluded=True,
        rule="must be 0 or more and under 1",
    ),
]
OverOneFloat = Annotated[
    float,
    Bounds(
        low=1,
        low_excluded=True,
        rule="must be above 1",
    ),
]
PortInt = Annotated[int, Bounds(low=0, high=65535, rule="must be 0 (any free one) to 65535")]
SeedInt = Annotated[
    int,
    Bounds(
        low=0,
        high=2**63,
        high_excluded=True,
        rule="must be 0 or more and under 2**63",
    ),
]


def check_bounds(config: Any, *, prefix: str = "") -> None:
    """Checks every number in a configuration against the bounds of its field's type.

    NaN, infinity and true or false are refused in every number field, bounded or not.

    Args:
        config: a dataclass instance; nested configurations check themselves.
        prefix: put before each field's name in an error, such as `sampling.`.

    Raises:
        ValueError: a value breaks its bounds; the message names field, value and rule.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        bounds = _bounds(hint)
        value = getattr(config, name)
        if bounds is None or value is None or isinstance(value, str):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{prefix}{name}={value!r}: must be a number")
        if not bounds.allow(value):
            raise ValueError(f"{prefix}{name}={value}: {bounds.rule}")


def _bounds(hint: Any) -> Bounds | None:
    """Bounds of a number type, of `int | None` and the like too; None for other types."""
    if hint in (int, float):
        return Bounds()
    if get_origin(hint) is Annotated:
        return next((extra for extra in hint.__metadata__ if isinstance(extra, Bounds)), None)
    found = [
        _bounds(part) for part in get_args(hint) if get_origin(hint) not in (list, tuple, dict)
    ]
    return next((bounds for bounds in found if bounds), None)
