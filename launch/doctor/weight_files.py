"""Weights of a folder: whether its files are whole, and their shapes, from headers alone."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from ...core.files import read_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OLD = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""Names of weights in pickles, which say nothing without being loaded."""


def weights_folder(path: str) -> Path | None:
    """The folder of a model on this host: its own, or that in the hub's cache; None if neither."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, local_files_only=True))
    except Exception:  # not in the cache, or no hub id
        return None


def weight_shapes(folder: Path, path: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights by name; empty for weights in pickles.

    Args:
        folder: the model's folder.
        path: what errors call the model.

    Raises:
        ValueError: a file is missing or incomplete.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _files(folder, path):
        file = folder / name
        if not file.is_file():
            raise ValueError(f"model {path}: its weights file {name} is missing: copy it again")
        try:
            with safe_open(file, "pt") as weights:
                for key in weights.keys():  # noqa: SIM118 no mapping
                    shapes[key] = tuple(weights.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"model {path}: its weights file {name} is damaged or incomplete ({error}): copy "
                "it again"
            ) from None
    return shapes


def _files(folder: Path, path: str) -> list[str]:
    if (folder / INDEX).is_file():
        content = json.loads(read_file(folder / INDEX, name="weights index"))
        return sorted(set(content["weight_map"].values()))
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if any((folder / name).is_file() for name in OLD):
        return []
    raise ValueError(f"model {path}: no weights ({SINGLE} or {INDEX}) in it: copy them there")
