"""Hugging Face decoders over packed batches: policy, critic and classifier.

Any decoder that uses transformers' attention interface works (Llama, Qwen2, Qwen2.5, Qwen3, ...).
Weights and layers are transformers' own, attention is `kernels.attention`, the head is
`kernels.logprob`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    PretrainedConfig,
    PreTrainedModel,
)

from ...kernels.attention import varlen_attention
from ...kernels.logprob import linear_greedy, linear_logprobs
from .packing import PackedBatch

ATTENTION = "verippo_varlen"


class KVCache(Protocol):
    """Keys and values stored by a sampler, whose `attend` replaces packed attention in decoding."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
    ) -> Tensor:
        """Attention of new tokens to everything stored so far.

        Args:
            layer: number of the layer.
            query: [tokens, heads, dim].
            key: [tokens, kv_heads, dim], as is `value`.
            scale: multiplies the products.

        Returns:
            [tokens, heads, dim].
        """
        ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    max_seqlen: int = 0,
    kv_cache: KVCache | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Packed attention under transformers' signature: [1, heads, tokens, dim] each."""
    if attention_mask is not None or sliding_window is not None:
        raise ValueError("its layers give attention a mask or a window of their own")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if kv_cache is not None:
        out = kv_cache.attend(module.layer_idx, q, k, v, scaling)  # type: ignore[arg-type]
    else:
        if cu_seqlens is None:
            raise ValueError("its layers do not pass the boundaries of sequences on to attention")
        out = varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale=scaling)
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION, _attention)


class LogprobHead(nn.Module):
    """The language-model head, a module so that ZeRO-3 gathers its weight around both passes."""

    def __init__(self, weight: nn.Parameter, *, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = weight  # the embedding's own parameter if they are tied
        self.scale = scale

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        with_greedy: bool = False,
    ) -> Any:
        """Log-probs of the targets without ever holding all logits; without targets, the logits.

        Args:
            hidden: [n, hidden].
            targets: [n] int64, token ids.
            temperature: divides the logits.
            with_entropy: return the entropies too.
            with_greedy: return too whether each target is the most likely token.
        """
        if targets is None:
            return F.linear(hidden, self.weight) * self.scale
        temperature /= self.scale
        weight = self.weight
        if with_entropy:
            both = linear_logprobs(
                hidden, weight, targets, temperature=temperature, with_entropy=True
            )
            return tuple(both)
        logprobs = linear_logprobs(hidden, weight, targets, temperature=temperature)
        if with_greedy:
            return logprobs, linear_greedy(hidden, weight, targets).float()
        return logprobs


class Policy(nn.Module):
    """A causal language model: packed batch -> log-probs of its response tokens."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        _check_head(hf)
        hf.lm_head = LogprobHead(hf.lm_head.weight, scale=logit_scale(hf.config))
        self.hf = hf

    def forward(self, batch: PackedBatch, **options: Any) -> Any:
        """Log-probs of the response tokens. Only response positions reach the head.

        Args:
            batch: packed sequences.
            options: `temperature` of the sampling; `with_entropy` for a pair with the entropies
                (nats); `with_greedy` for a pair with 1.0 where a token is the most likely one.

        Returns:
            [tokens] fp32, 0 off the mask, or a pair of them.
        """
        positions = batch.response_positions
        hidden = hidden_states(self.hf, batch)[positions - 1]
        result = self.hf.lm_head(hidden, batch.tokens[positions], **options)
        if isinstance(result, tuple):
            return tuple(_scatter(part, positions, batch) for part in result)
        return _scatter(result, positions, batch)


class Critic(nn.Module):
    """A decoder with a scalar head: packed batch -> values of the states before response tokens."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf: Any = hf

    def forward(self, batch: PackedBatch) -> Tensor:
        """Values [tokens] fp32 in units of reward; 0 off the mask."""
        positions = batch.response_positions
        values = self.hf.score(hidden_states(self.hf, batch)[positions - 1]).squeeze(-1)
        return _scatter(values.float(), positions, batch)


class Classifier(nn.Module):
    """A decoder with a class head on the last token of each sequence."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf: Any = hf

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits [seqs, classes] fp32."""
        last = batch.cu_seqlens[1:].long() - 1
        return self.hf.score(hidden_states(self.hf, batch)[last]).float()


def freeze_attention(hf: PreTrainedModel) -> None:
    """Leaves only MLPs, norms and head to be trained: attention and embeddings are frozen.

    Norms inside attention, such as those of Qwen3's queries and keys, belong to it.

    Args:
        hf: the model, before an engine takes it.

    Raises:
        ValueError: the model has no module whose class is called attention.

    Source: arXiv 2607.07508.
    """
    attention = [part for part in hf.modules() if type(part).__name__.endswith("Attention")]
    if not attention:
        raise ValueError(
            f"model type {hf.config.model_type}: no attention modules were found to freeze: "
            "leave critic_freeze at none"
        )
    embeddings = [part for part in hf.modules() if isinstance(part, nn.Embedding)]
    for part in attention + embeddings:
        part.requires_grad_(False)


def hidden_states(hf: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Last hidden states [tokens, hidden] of a packed batch; no sequence sees another."""
    cu_seqlens = batch.boundaries if batch.tokens.device.type == "cpu" else batch.cu_seqlens
    return decoder_pass(
        hf, batch.tokens, batch.position_ids, cu_seqlens=cu_seqlens, max_seqlen=batch.max_seqlen
    )


def decoder_pass(
    hf: PreTrainedModel,
    tokens: Tensor,
    position_ids: Tensor,
    **attention: Any,
) -> Tensor:
    """One pass of the decoder.

    Args:
        hf: the model.
        tokens: [tokens] int64.
        position_ids: [tokens] int64.
        attention: further arguments of `_attention`.

    Returns:
        Last hidden states [tokens, hidden].
    """
    output = hf.base_model(
        input_ids=tokens.unsqueeze(0),
        position_ids=position_ids.unsqueeze(0),
        use_cache=False,
        **attention,
    )
    return output.last_hidden_state[0]


def _scatter(x: Tensor, positions: Tensor, batch: PackedBatch) -> Tensor:
    return x.new_zeros(batch.num_tokens).index_put((positions,), x)


def _check_head(hf: PreTrainedModel) -> None:
    name = hf.config.model_type
    head = getattr(hf, "lm_head", None)
    if head is None or getattr(head, "bias", None) is not None:
        raise ValueError(
            f"model type {name}: its head is not a plain lm_head without bias, "
            "which the log-prob kernel needs"
        )


def logit_scale(config: PretrainedConfig) -> float:
    """Factor by which a family multiplies its logits: Granite divides them, Cohere scales them."""
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return (getattr(config, "logit_scale", None) or 1.0) / divisor
