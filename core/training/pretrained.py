"""Loading and checking of Hugging Face models and tokenizers."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
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

from ..files import is_path
from .engine import EngineConfig, shard_parameters, weights_are_sharded
from .lazy_weights import LazyWeights, weight_files
from .model import ATTENTION, Classifier, Critic, Policy, freeze_attention
from .self_check import check_config, check_family

ModuleT = TypeVar("ModuleT", bound=nn.Module)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEAD = "score.weight"
"""Name of the weight of a critic's or classifier's head."""
CriticHead = Literal["auto", "fresh", "kept"]
CriticFreeze = Literal["none", "attention"]


class _Loaded(NamedTuple):
    """A model in eval mode."""

    hf: Any
    misses_head: bool
    """Whether the folder lacks its classification head."""
    weights: LazyWeights | None
    """What its parameters stand in for; None if they are the weights themselves."""


def load_policy(path: str, *, dtype: str, engine: EngineConfig | None = None) -> Policy:
    """Loads a policy from a Hugging Face folder or hub id.

    Args:
        path: the folder or hub id.
        dtype: data type of the weights.
        engine: settings of the engine that will hold it. Under ZeRO-3 on several ranks each rank
            keeps its shards of the weights alone, from safetensors files read one weight at a time.

    Raises:
        ValueError: it cannot be loaded, or its head is not supported.
    """
    loaded = _load(AutoModelForCausalLM, path, dtype=dtype, engine=engine)
    return _sharded(Policy(loaded.hf), loaded, engine)


def load_causal_lm(path: str, *, dtype: str) -> PreTrainedModel:
    """Loads a causal language model with packed attention, in eval mode."""
    return _load(AutoModelForCausalLM, path, dtype=dtype).hf


def load_critic(
    path: str,
    *,
    dtype: str,
    head: CriticHead = "auto",
    freeze: CriticFreeze = "none",
    engine: EngineConfig | None = None,
) -> Critic:
    """Loads a critic from any decoder.

    Args:
        path: Hugging Face folder or hub id.
        dtype: "bf16" or "fp32".
        head: "fresh" starts the head at zero, whatever the folder has; "kept" needs the folder's;
            "auto" keeps it if there is one.
        freeze: "attention" leaves only MLPs, norms and head to be trained.
        engine: as for `load_policy`.

    Raises:
        ValueError: it cannot be loaded, its head is to be kept and missing, or has several outputs.
    """
    loaded = _load_scored(
        path,
        num_labels=1,
        dtype=dtype,
        head=head,
        missing_head="critic_head=kept, but there is no head (score.weight) in it: give "
        "critic_head=fresh, or a model that `verippo critic` wrote",
        engine=engine,
    )
    if freeze == "attention":
        freeze_attention(loaded.hf)
    return _sharded(Critic(loaded.hf), loaded, engine)


def load_classifier(
    path: str,
    *,
    dtype: str,
    fresh_head: bool = False,
    engine: EngineConfig | None = None,
) -> Classifier:
    """Loads a two-class classifier.

    Args:
        path: a Hugging Face folder or hub id.
        dtype: data type of the weights.
        fresh_head: whether the folder may lack the class head, which then starts at zero.
        engine: as for `load_policy`.

    Raises:
        ValueError: the folder has no class head and `fresh_head` is false.
    """
    loaded = _load_scored(
        path,
        num_labels=2,
        dtype=dtype,
        head="auto" if fresh_head else "kept",
        missing_head="no classification head (score.weight) in it: "
        "train one with `verippo verifier`",
        engine=engine,
    )
    return _sharded(Classifier(loaded.hf), loaded, engine)


def _sharded(module: ModuleT, loaded: _Loaded, engine: EngineConfig | None) -> ModuleT:
    if loaded.weights is not None:
        assert engine is not None
        shard_parameters(module, engine, loaded.weights.read)
    return module


def _load_scored(
    path: str,
    *,
    num_labels: int,
    dtype: str,
    head: CriticHead,
    missing_head: str,
    engine: EngineConfig | None,
) -> _Loaded:
    """Loads a model with a linear head, which is zero if it is fresh; `missing_head`: the error."""
    config = load_config(path)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"model {path}: transformers has no classification model of type {config.model_type}: "
            "choose another model, or for a critic --advantage rloo, grpo or reinforce++, which "
            "need none"
        )
    loaded = _load(
        AutoModelForSequenceClassification,
        path,
        dtype=dtype,
        any_head=head == "fresh",
        engine=engine,
        num_labels=num_labels,
    )
    if loaded.misses_head and head == "kept":
        raise ValueError(f"model {path}: {missing_head}")
    if loaded.misses_head or head == "fresh":
        loaded.hf.score.weight = nn.Parameter(torch.zeros_like(loaded.hf.score.weight))
    return loaded


def _load(
    auto: Any,
    path: str,
    *,
    dtype: str,
    any_head: bool = False,
    engine: EngineConfig | None = None,
    **options: Any,
) -> _Loaded:
    """Loads a model, whose weights stay in their files if they are to be sharded.

    Any missing weight but the classification head is an error: transformers would fill it with
    random numbers. With `any_head`, a head of another shape counts as missing.
    """
    config = load_config(path)
    check_config(config, path)
    for name, value in options.items():
        setattr(config, name, value)
    check_family(auto, config, path)
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # hides the warning of a new head
    hf_logging.disable_progress_bar()
    how: dict[str, Any] = {
        "dtype": DTYPES[dtype],
        "attn_implementation": ATTENTION,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    weights = None
    hf: Any = None
    info: dict[str, Any] = {}
    try:
        if engine and weights_are_sharded(engine) and (files := weight_files(path)):
            weights = LazyWeights(files, DTYPES[dtype])
            hf, info = _with_stand_ins(auto, path, config, weights, how)
            own_values = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
            if not weights.cover(hf, own_values):
                weights = None
        if weights is None:
            hf, info = auto.from_pretrained(path, **how, **options)
    except Exception as error:  # damaged folders raise errors of many types
        raise ValueError(f"model {path}: cannot be loaded: {_one_line(error)}") from None
    finally:
        hf_logging.set_verbosity(verbosity)
    misses_head = _check_missing(hf, info, path, any_head=any_head)
    _silence_dropout(hf)
    return _Loaded(hf.eval(), misses_head, weights)


def _check_missing(hf: Any, info: dict[str, Any], path: str, *, any_head: bool) -> bool:
    """Whether the classification head is missing; any other missing weight is an error."""
    missing = set(info["missing_keys"])
    misshapen = {name for name, *_ in info["mismatched_keys"]}
    if any_head:
        missing |= misshapen & {HEAD}
        misshapen -= {HEAD}
    if missing - {HEAD} or misshapen:
        names = ", ".join(sorted(missing | misshapen)[:5])
        critic = hf.config.num_labels == 1
        hint = (
            "; for a critic, critic_head=fresh replaces it"
            if critic and misshapen == {HEAD}
            else ""
        )
        raise ValueError(
            f"model {path}: weights are missing or of another shape than {hf.config.model_type} "
            f"needs: {names}{hint}"
        )
    return bool(missing)


def _with_stand_ins(
    auto: Any,
    path: str,
    config: PretrainedConfig,
    weights: LazyWeights,
    how: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """As `auto.from_pretrained`, with stand-ins for the weights."""
    causal = auto is AutoModelForCausalLM
    mapping: Any = (
        MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    )
    hf, info = mapping[type(config)].from_pretrained(
        None, config=config, state_dict=dict(weights.stand_ins), **how
    )
    hf.name_or_path = hf.config.name_or_path = path
    with contextlib.suppress(OSError):  # there is none
        hf.generation_config = GenerationConfig.from_pretrained(path)
    return hf, info


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
