"""Sizes of a decoder, read from its configuration without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a causal language model."""

    name: str
    """Folder or hub id, for messages."""
    parameters: int
    """Number of parameters; a tied embedding counts once."""
    active_parameters: int
    """Those that take part in the pass of one token: fewer in a mixture of experts."""
    layers: int
    hidden: int
    intermediate: int
    """Inner size of the MLP that one token passes, all of its experts together."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Whether the head is the embedding."""
    qk_norm: bool = False
    """Whether queries and keys are normalised, as in Qwen3."""
    dtype: str = "bf16"
    """Data type of the weights in the model's files."""

    @property
    def embedding(self) -> int:
        """Number of parameters of the embedding, which is the largest matrix."""
        return self.vocabulary * self.hidden

    @property
    def decoder_parameters(self) -> int:
        """Parameters without the language-model head, as a critic or classifier has them."""
        return self.parameters if self.tied else self.parameters - self.embedding

    @property
    def query_size(self) -> int:
        """Size of a token's queries, all heads together."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Size of a token's keys, all heads together; its values have the same."""
        return self.kv_heads * self.head_dim


def model_shape(config: PretrainedConfig, name: str) -> ModelShape:
    """Reads the sizes of a model; parameters are counted on a model without storage.

    Args:
        config: configuration of a causal language model.
        name: folder or hub id, for messages.

    Raises:
        ValueError: transformers has no causal language model of this type.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model {name}: its sizes cannot be read: {reason}") from None
    text: Any = config.get_text_config()
    parameters = {id(p): p for p in model.parameters()}
    numbers = [p.numel() for p in parameters.values()]
    experts = [p.numel() for p in parameters.values() if p.dim() == 3]
    share = _active_share(text)
    dtype = str(getattr(text, "dtype", None) or "torch.bfloat16")
    return ModelShape(
        name=name,
        parameters=sum(numbers),
        active_parameters=sum(numbers) - round(sum(experts) * (1 - share)),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=_intermediate(text),
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        tied=bool(text.tie_word_embeddings),
        qk_norm=any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
        dtype="fp32" if "float32" in dtype else "bf16",
    )


def _num_experts(text: Any) -> int:
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if number := getattr(text, name, None):
            return number
    return 1


def _active_share(text: Any) -> float:
    """Share of the experts that one token passes; 1 without experts."""
    num = _num_experts(text)
    return getattr(text, "num_experts_per_tok", num) / num if num > 1 else 1.0


def _intermediate(text: Any) -> int:
    if _num_experts(text) == 1:
        return text.intermediate_size
    size = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    return size * text.num_experts_per_tok
