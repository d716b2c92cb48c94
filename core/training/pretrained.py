"""Loading, checking and saving of Hugging Face models and tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from ..files import is_path
from .checkpoint import explain_full_disk, follow_umask
from .model import ATTENTION, Classifier, Critic, Policy, freeze_attention
from .self_check import check_config, check_family

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEAD = "score.weight"
"""Name of the weight of a critic's or classifier's head."""
CriticHead = Literal["auto", "fresh", "kept"]
CriticFreeze = Literal["none", "attention"]


def load_policy(path: str, *, dtype: str) -> Policy:
    """Loads a policy from a Hugging Face folder or hub id.

    Raises:
        ValueError: it cannot be loaded, or its head is not supported.
    """
    return Policy(load_causal_lm(path, dtype=dtype))


def load_causal_lm(path: str, *, dtype: str) -> PreTrainedModel:
    """Loads a causal language model with packed attention, in eval mode."""
    return _load(AutoModelForCausalLM, path, dtype=dtype)[0]


def load_critic(
    path: str,
    *,
    dtype: str,
    head: CriticHead = "auto",
    freeze: CriticFreeze = "none",
) -> Critic:
    """Loads a critic from any decoder.

    Args:
        path: Hugging Face folder or hub id.
        dtype: "bf16" or "fp32".
        head: "fresh" starts the head at zero, whatever the folder has; "kept" needs the folder's;
            "auto" keeps it if there is one.
        freeze: "attention" leaves only MLPs, norms and head to be trained.

    Raises:
        ValueError: it cannot be loaded, its head is to be kept and missing, or has several outputs.
    """
    hf, fresh = _load_scored(path, num_labels=1, dtype=dtype, any_head=head == "fresh")
    if head == "kept" and fresh:
        raise ValueError(
            f"model {path}: critic_head=kept, but there is no head (score.weight) in it: give "
            "critic_head=fresh, or a model that `verippo critic` wrote"
        )
    if head == "fresh" or fresh:
        nn.init.zeros_(hf.score.weight)
    if freeze == "attention":
        freeze_attention(hf)
    return Critic(hf)


def load_classifier(path: str, *, dtype: str, fresh_head: bool = False) -> Classifier:
    """Loads a two-class classifier.

    Raises:
        ValueError: the folder has no class head and `fresh_head` is false.
    """
    hf, fresh = _load_scored(path, num_labels=2, dtype=dtype)
    if fresh:
        if not fresh_head:
            raise ValueError(
                f"model {path}: no classification head (score.weight) in it: "
                "train one with `verippo verifier`"
            )
        nn.init.zeros_(hf.score.weight)
    return Classifier(hf)


def _load_scored(
    path: str,
    *,
    num_labels: int,
    dtype: str,
    any_head: bool = False,
) -> tuple[Any, bool]:
    """The model, and whether the folder lacks its head, which then holds no useful numbers."""
    config = load_config(path)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"model {path}: transformers has no classification model of type {config.model_type}: "
            "choose another model, or for a critic --advantage rloo, grpo or reinforce++, which "
            "need none"
        )
    return _load(
        AutoModelForSequenceClassification,
        path,
        dtype=dtype,
        any_head=any_head,
        num_labels=num_labels,
    )


def _load(
    auto: Any,
    path: str,
    *,
    dtype: str,
    any_head: bool = False,
    **options: Any,
) -> tuple[Any, bool]:
    """The model in eval mode, and whether the folder lacks its classification head.

    Any other missing weight is an error: transformers would fill it with random numbers. With
    `any_head`, a head of another shape counts as missing.
    """
    config = load_config(path)
    check_config(config, path)
    for name, value in options.items():
        setattr(config, name, value)
    check_family(auto, config, path)
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # hides the warning of a new head
    hf_logging.disable_progress_bar()
    try:
        options |= {
            "attn_implementation": ATTENTION,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }
        hf, info = auto.from_pretrained(path, dtype=DTYPES[dtype], **options)
    except Exception as error:  # damaged folders raise errors of many types
        raise ValueError(f"model {path}: cannot be loaded: {_one_line(error)}") from None
    finally:
        hf_logging.set_verbosity(verbosity)
    missing = set(info["missing_keys"])
    misshapen = {name for name, *_ in info["mismatched_keys"]}
    if any_head:
        missing |= misshapen & {HEAD}
        misshapen -= {HEAD}
    if missing - {HEAD} or misshapen:
        names = ", ".join(sorted(missing | misshapen)[:5])
        critic = options.get("num_labels") == 1
        hint = (
            "; for a critic, critic_head=fresh replaces it"
            if critic and misshapen == {HEAD}
            else ""
        )
        raise ValueError(
            f"model {path}: weights are missing or of another shape than {hf.config.model_type} "
            f"needs: {names}{hint}"
        )
    _silence_dropout(hf)
    return hf.eval(), bool(missing)


def _silence_dropout(hf: PreTrainedModel) -> None:
    # gradient checkpointing needs train mode, in which dropout would add noise to log rho
    for module in hf.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def check_exists(path: str) -> None:
    """Refuses a path that does not exist, instead of looking for it on the hub.

    Raises:
        ValueError: it does not exist, and is no hub id.
    """
    if is_path(str(path)) and not Path(path).exists():
        raise ValueError(f"model {path}: no such folder")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model.

    Raises:
        ValueError: it cannot be loaded, or has no end-of-sequence token.
    """
    check_exists(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        where = "" if Path(path).is_dir() else "not a folder here, and as a hub id: "
        raise ValueError(f"model {path}: no tokenizer: {where}{_one_line(error)}") from None
    # hides its warning of a text over the model's length: callers check lengths themselves
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model {path}: its tokenizer has no eos_token: responses could never end")
    return tokenizer


def has_tokenizer(path: str) -> bool:
    """Whether a model's folder has a tokenizer; true for a hub id."""
    folder = Path(path)
    return not folder.is_dir() or any(folder.glob("token*"))


def check_same_vocabulary(first: str, second: str) -> None:
    """Checks that two models' tokenizers give every id the same meaning.

    Raises:
        ValueError: they do not; the message names both.
    """
    a = load_tokenizer(first).get_vocab()
    b = load_tokenizer(second).get_vocab()
    if a != b:
        differing = sum(a.get(token) != b.get(token) for token in a.keys() | b.keys())
        raise ValueError(
            f"{first} and {second} do not share a vocabulary ({len(a)} and {len(b)} tokens, "
            f"{differing} differ): policy, reference and critic read the same token ids"
        )


def load_config(path: str) -> PretrainedConfig:
    """Loads a model's configuration alone.

    Raises:
        ValueError: it cannot be loaded.
    """
    check_exists(path)
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:
        raise ValueError(f"model {path}: cannot be loaded: {_one_line(error)}") from None


def check_embedding(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, path: str
) -> None:
    """Checks that the model has an embedding for every id of the tokenizer.

    Raises:
        ValueError: it has fewer.
    """
    num_embeddings = config.get_text_config().vocab_size
    if len(tokenizer) > num_embeddings:
        raise ValueError(
            f"model {path}: has {num_embeddings} embeddings, but its tokenizer {len(tokenizer)} "
            "tokens"
        )


def context_length(config: PretrainedConfig) -> int | None:
    """Number of positions that the model was made for, if its configuration says so."""
    return getattr(config, "max_position_embeddings", None)


def save_model(
    folder: Path,
    hf: PreTrainedModel,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_token_ids: Sequence[int] = (),
) -> None:
    """Writes a Hugging Face folder: safetensors, configuration, tokenizer.

    Args:
        folder: the folder to write.
        hf: the model, for its configuration.
        state: gathered weights by name.
        tokenizer: saved beside the weights.
        stop_token_ids: ids that end a response, for generation_config.json; empty for a model that
            generates none.
    """
    if stop_token_ids and hf.generation_config is not None:
        hf.generation_config.eos_token_id = list(stop_token_ids)
    if getattr(hf.config, "tie_word_embeddings", False) and "lm_head.weight" in state:
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    attention = hf.config._attn_implementation
    hf.config._attn_implementation = "eager"
    with explain_full_disk(folder.parent, folder.name):
        try:
            hf.save_pretrained(folder, state_dict=state)
        finally:
            hf.config._attn_implementation = attention
        tokenizer.save_pretrained(folder)
        follow_umask(folder)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
