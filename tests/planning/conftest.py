"""Configurations of published models, written down from their config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
QWEN = {"model_type": "qwen2", "vocab_size": 152064}
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-8b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-70b": LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "llama-3b": LLAMA
    | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "qwen-0.5b": QWEN
    | {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen-7b": QWEN
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "qwen-72b": QWEN
    | {
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""Sizes by short name; where the head is the embedding, it says so."""


@pytest.fixture
def config_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a published model's config.json to a folder, with changes, and returns the folder."""

    def write(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tie_word_embeddings": False, "dtype": "bfloat16"} | PUBLISHED[name] | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write
