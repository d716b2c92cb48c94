"""Loading of functions that users name as `module:name`."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


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
