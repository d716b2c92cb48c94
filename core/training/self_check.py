"""Compares packed passes of a model family with transformers' own, before a run trusts them."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from .model import ATTENTION, decoder_pass, logit_scale
from .packing import pack_token_rows

TOLERANCE = 1e-3
"""Largest difference in nats, or in units of a hidden state, at fp32: round-off is under 1e-5."""
LENGTHS = (23, 9)
"""Tokens of the sequences that are compared."""
_SMALL = {
    "num_hidden_layers": 2,
    "vocab_size": 97,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
_UNSUPPORTED_ROPE = ("dynamic", "longrope")


def check_config(config: PretrainedConfig, path: str) -> None:
    """Checks that a configuration names nothing that is known not to run over packed sequences.

    Raises:
        ValueError: it does; the message names it.
    """
    where = f"model {path} ({config.model_type})"
    if config.get_text_config() is not config:
        raise ValueError(
            f"{where}: wraps a text decoder with other models: save the decoder by itself"
        )
    layers = getattr(config, "layer_types", None)
    # without a list of layer types (Mistral) the window applies to every layer
    windowed = layers is None or "sliding_attention" in layers
    if getattr(config, "sliding_window", None) and windowed:
        raise ValueError(
            f"{where}: sliding-window attention is not supported; use a model with full attention"
        )
    if others := {*(layers or ())} - {"full_attention", "sliding_attention"}:
        kinds = ", ".join(sorted(others))
        raise ValueError(
            f"{where}: layers of kind {kinds} are not supported; use a model with full attention"
        )
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(config, name, None):
            raise ValueError(f"{where}: {name} is not supported by the kernels")
    rope: Any = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind in _UNSUPPORTED_ROPE:
        raise ValueError(
            f"{where}: rope_type {kind} depends on the longest sequence of a batch and is not "
            "supported: packing would change the log-probs"
        )


def check_family(auto: Any, config: PretrainedConfig, path: str) -> None:
    """Checks on a small random model of the family that packing changes nothing.

    The model has two layers of the configuration's kind, in fp32. Its hidden states, and log-probs
    if it has a language-model head, over packed sequences are compared with those of transformers'
    eager attention over each sequence alone.

    Args:
        auto: the class that loads the model, such as AutoModelForCausalLM.
        config: the model's configuration.
        path: what error messages call the model.

    Raises:
        ValueError: they differ, or the packed pass fails; the message names the difference.
    """
    if fault := _fault(_packed_difference, auto, _description(config)):
        raise ValueError(f"model {path} ({config.model_type}): cannot be used: {fault}")


def check_decoding(
    decode: Callable[[Any, list[list[int]]], Tensor], config: PretrainedConfig, path: str
) -> None:
    """Checks on a small random model of the family that a sampler's log-probs are right.

    Args:
        decode: decodes a few tokens after each prompt with a model, and returns the largest
            difference of their log-probs from those that `own_outputs` gives.
        config: the model's configuration.
        path: what error messages call the model.

    Raises:
        ValueError: they differ, or decoding fails; the message names the difference.
    """
    if fault := _fault(decode, AutoModelForCausalLM, _description(config)):
        raise ValueError(f"model {path} ({config.model_type}): cannot be sampled from: {fault}")


@functools.lru_cache(maxsize=32)
def _fault(
    compare: Callable[[Any, list[list[int]]], Tensor], auto: Any, description: str
) -> str | None:
    settings = json.loads(description)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    try:
        with torch.no_grad():
            difference = float(compare(small_model(auto, config), sample_rows(config.vocab_size)))
    except Exception as error:  # families fail in ways of their own: assertions, shapes, attributes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return f"its passes over packed sequences fail ({reason})"
    if difference <= TOLERANCE:
        return None
    return (
        f"its log-probs or hidden states differ from transformers' own by {difference:.3g} "
        f"(at most {TOLERANCE:g}): its attention or its head is of a kind that is not supported"
    )


def _description(config: PretrainedConfig) -> str:
    return small_config(config, _SMALL).to_json_string(use_diff=False)


def _packed_difference(model: Any, rows: list[list[int]]) -> Tensor:
    packed = _packed_outputs(model, rows)
    model.set_attn_implementation("eager")
    alone = torch.cat([own_outputs(model, row) for row in rows])
    return (packed - alone).abs().max()


def small_model(auto: Any, config: PretrainedConfig) -> Any:
    """A model with the configuration, in fp32 with packed attention, with random weights.

    The weights are so large that every part contributes to the output.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config, attn_implementation=ATTENTION, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            embedding = model.get_input_embeddings().weight
            embedding.normal_(0, 1)
    return model.eval()


def sample_rows(vocab_size: int) -> list[list[int]]:
    """Token ids of the sequences that are compared."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(1, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS
    ]


def small_config(config: PretrainedConfig, limits: Mapping[str, int]) -> PretrainedConfig:
    """A copy of a configuration with smaller numbers, and without the ids of special tokens.

    Args:
        config: the configuration.
        limits: upper bounds of its fields; those that it lacks are passed over.
    """
    small = copy.deepcopy(config)
    for name, limit in limits.items():
        if isinstance(value := getattr(small, name, None), int):
            setattr(small, name, min(value, limit))
    for name in _LAYER_LISTS:
        if isinstance(value := getattr(small, name, None), list):
            setattr(small, name, value[: small.num_hidden_layers])
    small.bos_token_id = small.eos_token_id = small.pad_token_id = None
    return small


def _packed_outputs(model: Any, rows: list[list[int]]) -> Tensor:
    batch = pack_token_rows(rows)
    hidden = decoder_pass(
        model,
        batch.tokens,
        batch.position_ids,
        cu_seqlens=batch.boundaries,
        max_seqlen=batch.max_seqlen,
    )
    head = getattr(model, "lm_head", None)
    if head is None:
        return hidden
    return (head(hidden) * logit_scale(model.config)).log_softmax(-1)


def own_outputs(model: Any, row: Sequence[int]) -> Tensor:
    """What transformers itself computes for one sequence: log-probs, or hidden states of a critic.

    Returns:
        [tokens, vocabulary] or [tokens, hidden].
    """
    tokens = torch.tensor([list(row)])
    if getattr(model, "lm_head", None) is None:
        return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
    return model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
