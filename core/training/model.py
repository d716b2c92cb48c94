"""Hugging Face decoders over packed batches: the policy, the critic and the classifier.

Any decoder whose attention goes through transformers' attention interface works (Llama, Qwen2, Qwen2.5, Qwen3, ...):
its weights and layers are transformers' own, its attention is `kernels.attention`, its head is `kernels.logprob`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from ...kernels.attention import varlen_attention
from ...kernels.logprob import linear_greedy, linear_logprobs
from .checkpoint import naming_a_full_disk
from .packing import PackedBatch

ATTENTION = "verippo_varlen"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class KVCache(Protocol):
    """A sampler's store of keys and values, which takes the place of packed attention while it decodes."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [tokens, heads, dim], key and value [tokens, kv_heads, dim] -> [tokens, heads, dim]"""
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
    """transformers' attention signature: [1, heads, tokens, dim] each, on to the packed form and back."""
    assert attention_mask is None
    assert sliding_window is None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if kv_cache is not None:
        out = kv_cache.attend(module.layer_idx, q, k, v, scaling)  # type: ignore[arg-type]
    else:
        assert cu_seqlens is not None
        out = varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale=scaling)
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION, _attention)


class LogprobHead(nn.Module):
    """The language-model head, called as a module so that ZeRO-3 gathers its weight around both passes."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight  # the embedding's own parameter where they are tied

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        with_greedy: bool = False,
    ) -> Any:
        """Logits without targets; else the targets' log-probs, and if asked the entropies, or which targets are the
        likeliest: never all logits at once."""
        if targets is None:
            return F.linear(hidden, self.weight)
        if with_entropy:
            return tuple(
                linear_logprobs(
                    hidden, self.weight, targets, temperature=temperature, with_entropy=True
                )
            )
        logprobs = linear_logprobs(hidden, self.weight, targets, temperature=temperature)
        return (
            (logprobs, linear_greedy(hidden, self.weight, targets).float())
            if with_greedy
            else logprobs
        )


class Policy(nn.Module):
    """A causal language model: packed batch -> log-probs of its response tokens."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        _check_head(hf)
        hf.lm_head = LogprobHead(hf.lm_head.weight)
        self.hf = hf

    def forward(self, batch: PackedBatch, **options: Any) -> Any:
        """Log-probs [tokens] fp32 of the response tokens; 0 off the mask.

        options: temperature, the sampling's; with_entropy: a pair with the entropies [tokens] (nats); with_greedy: a pair
        with 1.0 where the token is the likeliest one [tokens].
        Only response positions reach the head: the hidden state before token p predicts token p.
        """
        positions = batch.response_positions
        hidden = hidden_states(self.hf, batch)[positions - 1]
        result = self.hf.lm_head(hidden, batch.tokens[positions], **options)
        if isinstance(result, tuple):
            return tuple(_scatter(part, positions, batch) for part in result)
        return _scatter(result, positions, batch)


class Critic(nn.Module):
    """A decoder with a scalar head: packed batch -> value of the state before each response token."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf: Any = hf

    def forward(self, batch: PackedBatch) -> Tensor:
        """Values [tokens] fp32 (units of reward); 0 off the mask."""
        positions = batch.response_positions
        values = self.hf.score(hidden_states(self.hf, batch)[positions - 1]).squeeze(-1)
        return _scatter(values.float(), positions, batch)


class Classifier(nn.Module):
    """A decoder with a class head on each sequence's last token: packed batch -> class logits."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf: Any = hf

    def forward(self, batch: PackedBatch) -> Tensor:
        """Logits [seqs, classes] fp32."""
        last = batch.cu_seqlens[1:].long() - 1
        return self.hf.score(hidden_states(self.hf, batch)[last]).float()


def hidden_states(hf: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """The decoder's last hidden states [tokens, hidden] of a packed batch; no sequence sees another."""
    cu_seqlens = batch.boundaries if batch.tokens.device.type == "cpu" else batch.cu_seqlens
    return decoder_pass(
        hf, batch.tokens, batch.position_ids, cu_seqlens=cu_seqlens, max_seqlen=batch.max_seqlen
    )


def decoder_pass(
    hf: PreTrainedModel, tokens: Tensor, position_ids: Tensor, **attention: Any
) -> Tensor:
    """One pass of the decoder over [tokens] ids: its last hidden states [tokens, hidden]. `attention` reaches `_attention`."""
    output = hf.base_model(
        input_ids=tokens.unsqueeze(0),
        position_ids=position_ids.unsqueeze(0),
        use_cache=False,
        **attention,
    )
    return output.last_hidden_state[0]


def _scatter(x: Tensor, positions: Tensor, batch: PackedBatch) -> Tensor:
    return x.new_zeros(batch.num_tokens).index_put((positions,), x)


def load_policy(path: str, *, dtype: str) -> Policy:
    """A policy from a Hugging Face folder or hub id. Raises ValueError when it cannot be loaded or has an unknown head."""
    return Policy(load_causal_lm(path, dtype=dtype))


def load_causal_lm(path: str, *, dtype: str) -> PreTrainedModel:
    """The causal language model with packed attention, in eval mode."""
    return _load(AutoModelForCausalLM, path, dtype=dtype)[0]


def load_critic(path: str, *, dtype: str) -> Critic:
    """A critic from any decoder's folder. Its scalar head starts at zero unless the folder brings one."""
    return Critic(_load_scored(path, num_labels=1, dtype=dtype))


def load_classifier(path: str, *, dtype: str, fresh_head: bool = False) -> Classifier:
    """A two-class classifier. Raises ValueError when the folder brings no class head and `fresh_head` does not allow it."""
    return Classifier(_load_scored(path, num_labels=2, dtype=dtype, need_head=not fresh_head))


def _load_scored(
    path: str, *, num_labels: int, dtype: str, need_head: bool = False
) -> PreTrainedModel:
    hf, missing = _load(
        AutoModelForSequenceClassification, path, dtype=dtype, num_labels=num_labels
    )
    if missing:
        if need_head:
            raise ValueError(
                f"model {path}: no classification head (score.weight) in it: train one with `verippo verifier`"
            )
        nn.init.zeros_(hf.score.weight)
    return hf


def _load(auto: Any, path: str, *, dtype: str, **options: Any) -> tuple[Any, bool]:
    """The model in eval mode, and whether its classification head is missing from the folder; any other missing weight is
    an error: transformers would fill it with random numbers."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # a new head is announced as a warning; ours is on purpose
    hf_logging.disable_progress_bar()
    try:
        options |= {
            "attn_implementation": ATTENTION,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }
        hf, info = auto.from_pretrained(path, dtype=DTYPES[dtype], **options)
    except (
        Exception
    ) as error:  # each part of transformers that reads a damaged folder raises kinds of its own
        raise ValueError(
            f"model {path}: cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    finally:
        hf_logging.set_verbosity(verbosity)
    _check_supported(hf.config, path)
    absent, misshapen = set(info["missing_keys"]), {name for name, *_ in info["mismatched_keys"]}
    if absent - {"score.weight"} or misshapen:
        names = ", ".join(sorted(absent | misshapen)[:5])
        raise ValueError(
            f"model {path}: weights are missing or of another shape than {hf.config.model_type} needs: {names}"
        )
    _silence_dropout(hf)
    return hf.eval(), bool(absent)


def _check_supported(config: PretrainedConfig, path: str) -> None:
    layers = getattr(
        config, "layer_types", None
    )  # without such a list (Mistral) the window holds for every layer
    if getattr(config, "sliding_window", None) and (
        layers is None or "sliding_attention" in layers
    ):
        raise ValueError(
            f"model {path}: sliding-window attention is not supported; use a model with full attention"
        )


def _check_head(hf: PreTrainedModel) -> None:
    name = hf.config.model_type
    head = getattr(hf, "lm_head", None)
    if head is None or getattr(head, "bias", None) is not None:
        raise ValueError(
            f"model type {name}: its head is not a plain lm_head without bias, which the log-prob kernel needs"
        )
    for scaling in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(hf.config, scaling, None) not in (None, 1.0):
            raise ValueError(
                f"model type {name}: {scaling} is not supported by the log-prob kernel"
            )


def _silence_dropout(hf: PreTrainedModel) -> None:
    # train mode is needed for gradient checkpointing; dropout would make log rho noise (our attention has none)
    for module in hf.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises ValueError when it cannot be loaded or has no end-of-sequence token."""
    if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ValueError(f"model {path}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        where = "" if Path(path).is_dir() else "not a folder here, and as a hub id: "
        raise ValueError(
            f"model {path}: no tokenizer: {where}{' '.join(str(error).split())[:300]}"
        ) from None
    # its one warning for a text over the model's length: who calls checks lengths, and says which text is too long
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model {path}: its tokenizer has no eos_token: responses could never end")
    return tokenizer


def stop_token_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a response: the tokenizer's end-of-sequence and those of generation_config.json."""
    stops = {tokenizer.eos_token_id}
    try:
        configured = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        configured = None
    if configured is not None:
        stops.update(configured if isinstance(configured, list) else [configured])
    return tuple(sorted(stops))


def check_same_vocabulary(first: str, second: str) -> None:
    """Raises ValueError unless both folders' tokenizers give every id the same meaning, naming both."""
    a, b = load_tokenizer(first).get_vocab(), load_tokenizer(second).get_vocab()
    if a != b:
        differing = sum(a.get(token) != b.get(token) for token in a.keys() | b.keys())
        raise ValueError(
            f"{first} and {second} do not share a vocabulary ({len(a)} and {len(b)} tokens, {differing} differ): the policy, "
            "the reference and the critic read the same token ids"
        )


def load_config(path: str) -> PretrainedConfig:
    """The model's configuration alone. Raises ValueError when it cannot be loaded."""
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:
        raise ValueError(
            f"model {path}: cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None


def check_embedding(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, path: str
) -> None:
    """Raises ValueError when the tokenizer knows ids that the model has no embedding for."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"model {path}: has {config.vocab_size} embeddings, the tokenizer {len(tokenizer)} tokens"
        )


def context_length(config: PretrainedConfig) -> int | None:
    """The most positions the model was made for, where its configuration says so."""
    return getattr(config, "max_position_embeddings", None)


def save_model(
    folder: Path, hf: PreTrainedModel, state: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Writes a Hugging Face folder (safetensors, config, tokenizer) from gathered weights `state`."""
    if getattr(hf.config, "tie_word_embeddings", False) and "lm_head.weight" in state:
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    attention = hf.config._attn_implementation
    hf.config._attn_implementation = "eager"
    with naming_a_full_disk(folder.parent, folder.name):
        try:
            hf.save_pretrained(folder, state_dict=state)
        finally:
            hf.config._attn_implementation = attention
        tokenizer.save_pretrained(folder)
