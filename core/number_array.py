"""Token ids, log-probs and masks of a sequence: arrays that read like lists."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np

T = TypeVar("T", bound=float)


class NumberArray(Sequence[T], Generic[T]):
    """Numbers in a read-only array, which take 1 to 8 bytes each instead of a list's 36 or so.

    It equals a list of the same numbers, and its elements are Python's own numbers. `numpy.asarray`
    gives the array without a copy, which spares loops over the elements.
    """

    __slots__ = ("array",)

    def __init__(self, numbers: np.ndarray) -> None:
        """`numbers`: [n], as it is stored; it must not change afterwards."""
        self.array = numbers

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy:
            return self.array.astype(self.array.dtype if dtype is None else dtype)
        return self.array if dtype is None else self.array.astype(dtype, copy=False)

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> NumberArray[T]: ...
    def __getitem__(self, index: int | slice) -> T | NumberArray[T]:
        if isinstance(index, slice):
            return NumberArray(self.array[index])
        return self.array[index].item()

    def __iter__(self) -> Iterator[T]:
        return iter(self.array.tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (NumberArray, list, tuple, array, np.ndarray)):
            return NotImplemented
        return len(self) == len(other) and self.array.tolist() == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Sequence[T]) -> list[T]:
        return [*self, *other]

    def __radd__(self, other: Sequence[T]) -> list[T]:
        return [*other, *self]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the bytes: faster than numpy's own way for short arrays."""
        return _restored, (self.array.dtype.str, self.array.tobytes())

    def __repr__(self) -> str:
        return repr(self.array.tolist())


def _restored(dtype: str, data: bytes) -> NumberArray[Any]:
    return NumberArray(np.frombuffer(data, dtype))


def number_array(values: Any, dtype: Any) -> Any:
    """The values as a `NumberArray`.

    Args:
        values: a list, tuple or one-dimensional array.
        dtype: numpy's type of the array.

    Returns:
        The array; `values` themselves if they are something else, of another kind than `dtype`, or
        beyond its range: they are for a check to refuse.
    """
    if not isinstance(values, (list, tuple, array, np.ndarray)):
        return values
    try:
        numbers = np.array(values)
    except (ValueError, OverflowError):  # lists of different lengths, enormous numbers
        return values
    castable = not numbers.size or np.can_cast(numbers.dtype, dtype, "same_kind")
    if numbers.ndim != 1 or not castable:
        return values
    converted = numbers.astype(dtype, copy=False)
    if converted.dtype.kind == "i" and not np.array_equal(converted, numbers):
        return values
    return NumberArray(converted)


def convert_fields(record: Any, **dtypes: Any) -> None:
    """Makes number arrays of fields of a frozen dataclass, for its `__post_init__`.

    Args:
        record: the new object.
        dtypes: field -> numpy's type.
    """
    for name, dtype in dtypes.items():
        object.__setattr__(record, name, number_array(getattr(record, name), dtype))
