"""Small models of the same family, with random weights and the model's own vocabulary."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.utils import logging as hf_logging

from ...core.training.pretrained import load_config, load_tokenizer
from ...core.training.self_check import small_config

NUM_LAYERS = 2
HEAD_SIZE = 8
LIMITS = {
    "num_hidden_layers": NUM_LAYERS,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """A configuration with two layers and small sizes; family and vocabulary stay.

    Heads that share keys still do. With multi-head latent attention, whose sizes depend on each
    other, the hidden size stays.
    """
    small: Any = small_config(config, LIMITS)
    if getattr(small, "kv_lora_rank", None):
        return small
    heads: Any = getattr(small, "num_attention_heads", None)
    kv_heads = getattr(small, "num_key_value_heads", None) or heads
    small.num_attention_heads = 4
    small.num_key_value_heads = 4 if kv_heads == heads else 2
    small.hidden_size = 4 * HEAD_SIZE
    if getattr(small, "head_dim", None):
        small.head_dim = HEAD_SIZE
    return small


def write_small_model(
    path: str,
    folder: Path,
    auto: Any,
    *,
    num_labels: int | None = None,
    seed: int = 0,
) -> str:
    """Writes a small random model with the tokenizer of another model.

    Args:
        path: the other model, of which configuration and tokenizer are read.
        folder: the folder to write.
        auto: class of the model, such as AutoModelForCausalLM.
        num_labels: outputs of its head, for a critic or classifier.
        seed: seed of the weights.

    Returns:
        The folder.

    Raises:
        ValueError: configuration or tokenizer cannot be read, or the family cannot be made so
            small.
    """
    hf_logging.disable_progress_bar()
    config = shrunk(load_config(path))
    if num_labels:
        config.num_labels = num_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto.from_config(config, dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(path).save_pretrained(folder)
    settings = Path(path) / "generation_config.json"  # names further stop tokens
    if settings.is_file():
        shutil.copy(settings, folder)
    return str(folder)
