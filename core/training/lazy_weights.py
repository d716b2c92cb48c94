"""Weights that stay in their safetensors files until they are sharded, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files


def weight_files(path: str) -> list[str]:
    """The safetensors files of a model.

    Args:
        path: a Hugging Face folder or hub id.

    Returns:
        Paths; none if the model is stored in another format.
    """
    if single := _file(path, SAFE_WEIGHTS_NAME):
        return [single]
    index = _file(path, SAFE_WEIGHTS_INDEX_NAME)
    files = get_checkpoint_shard_files(path, index)[0] if index else None
    return files or []


def _file(path: str, name: str) -> str | None:
    try:
        return cached_file(path, name)
    except OSError:
        return None


class LazyWeights:
    """Stand-ins of the weights in files: tensors of their shapes that share one element.

    transformers puts the stand-ins into a model as it would the weights, under its own rules for
    names, shapes and tied weights. The address of a stand-in then tells which weight belongs there.
    """

    def __init__(self, files: Sequence[str], dtype: torch.dtype) -> None:
        """Args:
        files: safetensors files.
        dtype: data type of the model.
        """
        self.stand_ins: dict[str, Tensor] = {}
        self._places: dict[int, tuple[str, str]] = {}
        for path in files:
            with safe_open(Path(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 not a dictionary
                    shape = file.get_slice(name).get_shape()
                    stand_in = torch.zeros((), dtype=dtype).expand(shape)
                    self.stand_ins[name] = stand_in
                    self._places[stand_in.data_ptr()] = (path, name)

    def cover(self, hf: PreTrainedModel, missing: set[str]) -> bool:
        """Whether every parameter of a model with stand-ins is stored as such, or missing.

        Families whose stored weights are converted, such as stacked experts, are not.
        """
        stored = [tensor.data_ptr() in self._places for tensor in hf.buffers()]
        return not any(stored) and all(
            parameter.data_ptr() in self._places or name in missing
            for name, parameter in hf.named_parameters()
        )

    def read(self, parameter: Tensor) -> Tensor:
        """The weight for which a parameter stands in; the parameter itself if it is none.

        It is in the file's data type, and its memory is the mapped file.
        """
        place = self._places.get(parameter.data_ptr())
        if place is None:
            return parameter.detach()
        path, name = place
        with safe_open(Path(path), framework="pt") as file:
            return file.get_tensor(name)
