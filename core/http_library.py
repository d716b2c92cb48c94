"""The HTTP library that openai brings along: httpx2 with its version 3, httpx before."""

from __future__ import annotations

import importlib
from importlib.metadata import requires
from typing import Any

_NAME = "httpx2" if any(need.startswith("httpx2") for need in requires("openai") or ()) else "httpx"
httpx: Any = importlib.import_module(_NAME)
