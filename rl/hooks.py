"""Loading of functions that users name as `module:name`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sized
from typing import Any

from torch import Tensor


def load_function(spec: str, *, option: str) -> Any:
    """Imports the callable that `module:name` names, from the working directory too.

    Args:
        spec: `module:name`.
        option: name of the option, for errors.

    Raises:
        ValueError: it is malformed, cannot be imported, or is not callable.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or module_name.startswith(".") or not name:
        raise ValueError(f"{option}={spec}: give module:name")
    # appended: a folder named like an installed package must not shadow it
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(f"{option}={spec}: {error}") from None
    if not callable(function):
        raise ValueError(f"{option}={spec}: not callable")
    return function


def describe(value: Any) -> str:
    """What a user's function returned, for errors: its kind, and its size or short text."""
    kind = type(value).__name__
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a Tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, (bool, int, float, str)):
        return f"{kind} {str(value)[:40]!r}"
    return f"{kind} of {len(value)}" if isinstance(value, Sized) else f"{kind}"


def check_sampler(sampler: Any, *, name: str) -> Any:
    """Refuses a sampler without the methods of the protocol.

    Args:
        sampler: what the factory returned.
        name: the factory's module:name, for errors.

    Raises:
        ValueError: `generate` or `update_weights` is missing, or it is a class.
    """
    methods = [getattr(sampler, method, None) for method in ("generate", "update_weights")]
    if isinstance(sampler, type) or not all(map(callable, methods)):
        raise ValueError(
            f"sampler.factory={name} returned {describe(sampler)}: must be an object with the "
            "methods generate and update_weights"
        )
    return sampler
