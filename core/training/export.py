"""Saving of models as Hugging Face folders."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from . import dist
from .checkpoint import explain_full_disk, follow_umask
from .merging import stored_weights
from .shard_files import MAX_FILE_BYTES, write_weights


def save_model(
    folder: Path,
    hf: PreTrainedModel,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_token_ids: Sequence[int] = (),
) -> None:
    """Writes a Hugging Face folder: safetensors, configuration, tokenizer.

    The main rank writes a temporary folder, a file of weights at a time, and renames it.

    Args:
        folder: the folder to write.
        hf: the model, for its configuration.
        weights: weights by name; or those that a sharded engine yields one at a time, which every
            rank must iterate, so that every rank must call this function.
        tokenizer: saved beside the weights.
        stop_token_ids: ids that end a response, for generation_config.json; empty for a model that
            generates none.
    """
    pairs: Any = weights.items() if isinstance(weights, Mapping) else weights
    if not dist.is_main():
        for _ in pairs:  # gathered by all ranks together
            pass
        return
    if stop_token_ids and hf.generation_config is not None:
        hf.generation_config.eos_token_id = list(stop_token_ids)
    temporary = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
    attention = hf.config._attn_implementation
    hf.config._attn_implementation = "eager"
    with explain_full_disk(folder.parent, folder.name):
        try:
            _write(temporary, hf, pairs)
        finally:
            hf.config._attn_implementation = attention
        tokenizer.save_pretrained(temporary)
        follow_umask(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)


def _write(folder: Path, hf: PreTrainedModel, pairs: Iterable[tuple[str, Tensor]]) -> None:
    tied = getattr(hf.config, "tie_word_embeddings", False)
    stored = ((name, x) for name, x in pairs if not (tied and name == "lm_head.weight"))
    if _is_stored_as_held(hf):
        hf.save_pretrained(folder, state_dict={})  # the configuration alone
        write_weights(folder, stored, MAX_FILE_BYTES)
    else:
        hf.save_pretrained(folder, state_dict={name: x.cpu().clone() for name, x in stored})


def _is_stored_as_held(hf: PreTrainedModel) -> bool:
    """Whether the files hold the same tensors as the model; experts, for one, are stacked in it."""
    held = {weight.name: torch.empty(weight.shape, device="meta") for weight in stored_weights(hf)}
    stored = revert_weight_conversion(hf, dict(held))
    return stored.keys() == held.keys() and all(stored[name] is x for name, x in held.items())
