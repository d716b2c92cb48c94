"""Folders with nothing but a published model's config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def config_folder(
    tmp_path: Path, published_models: dict[str, dict[str, Any]]
) -> Callable[..., Path]:
    """Writes a published model's config.json to a folder, and returns the folder."""

    def write(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(published_models[name]))
        return folder

    return write
