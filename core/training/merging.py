"""Weights of a model with adapters as its files have them: merged, under their own names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ADAPTER = "default"
"""Name of the adapters in peft's layers."""
BASE_FILE = "base.txt"
"""File of a checkpoint with the digest of the weights under its adapters."""
Gather = Callable[..., AbstractContextManager[Any]]
"""Makes the given parameters whole within its context."""


class StoredWeight(NamedTuple):
    """A weight of a Hugging Face folder."""

    name: str
    parts: tuple[nn.Parameter, ...]
    """The model's own weight, and those of its adapters."""
    value: Callable[[], Tensor]
    """The weight with its adapters merged; all parts must be whole."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole weight, also while its parts are sharded."""
        return tuple(getattr(self.parts[0], "ds_shape", self.parts[0].shape))


def adapted_layers(hf: nn.Module) -> dict[str, Any]:
    """peft's layers of a model by name; none in a model without adapters."""
    if not hasattr(hf, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: part for name, part in hf.named_modules() if isinstance(part, LoraLayer)}


def stored_weights(hf: nn.Module) -> Iterator[StoredWeight]:
    """Yields every weight of a model as its files have it; tied weights once.

        W + (alpha / rank) B A

    The weights of the model and its adapters stay as they are.

    Args:
        hf: the Hugging Face model, with or without adapters.
    """
    layers = adapted_layers(hf)
    factors = {name: _factors(layer) for name, layer in layers.items()}
    hidden = {id(factor) for pair in factors.values() for factor in pair}
    for name, parameter in hf.named_parameters():
        if id(parameter) in hidden:
            continue
        owner, _, own = name.rpartition(".base_layer.")
        if not owner:
            yield StoredWeight(name, (parameter,), parameter.detach)
        elif own != "weight":
            yield StoredWeight(f"{owner}.{own}", (parameter,), parameter.detach)
        else:
            merge = partial(_merged, parameter, layers[owner])
            yield StoredWeight(f"{owner}.{own}", (parameter, *factors[owner]), merge)


@torch.no_grad()
def _merged(weight: nn.Parameter, layer: Any) -> Tensor:
    return weight + layer.get_delta_weight(ADAPTER)


def _factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def leave_out_frozen(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """State-dict hook of a model with adapters: its frozen weights are left out.

    DeepSpeed's own option keeps one of the names of a tied weight.
    """
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def write_base_digest(checkpoint: Path, hf: nn.Module, gather: Gather, *, write: bool) -> None:
    """Writes the digest of the frozen weights into a checkpoint. Every rank must call it.

    Args:
        checkpoint: folder that an engine has written.
        hf: the Hugging Face model.
        gather: makes parameters whole.
        write: whether this rank writes the file.
    """
    digest = _base_digest(hf, gather)
    if write:
        (checkpoint / BASE_FILE).write_text(digest)


def check_base_digest(checkpoint: Path, hf: nn.Module, gather: Gather) -> None:
    """Checks that a checkpoint's adapters belong to these frozen weights. Every rank must call it.

    Args:
        checkpoint: folder that an engine has written.
        hf: the Hugging Face model.
        gather: makes parameters whole.

    Raises:
        ValueError: they were trained over other weights.
    """
    path = checkpoint / BASE_FILE
    digest = _base_digest(hf, gather)
    found = path.read_text() if path.exists() else "none"
    if found != digest:
        raise ValueError(
            f"checkpoint {checkpoint}: its adapters were trained over weights with digest {found}, "
            f"but those of this model have {digest}: put the earlier model back"
        )


def _base_digest(hf: nn.Module, gather: Gather) -> str:
    """Hash of names and bits of the frozen weights; the same on every device and rank.

    The bits of a weight enter as the sum of its integers, which no order of addition changes.
    """
    digest = hashlib.sha256()
    for name, parameter in hf.named_parameters():
        if parameter.requires_grad:
            continue
        with gather(parameter):
            integer = torch.int16 if parameter.element_size() == 2 else torch.int32
            total = parameter.detach().view(integer).sum(dtype=torch.int64)
            digest.update(f"{name} {int(total)}\n".encode())
    return digest.hexdigest()[:16]
