"""Loading, checking and saving of Hugging Face models and tokenizers."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
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
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as hf_logging

from ..files import is_path
from . import dist
from .checkpoint import explain_full_disk, follow_umask
from .engine import EngineConfig, shard_parameters, shards_parameters
from .lazy_weights import LazyWeights, weight_files
from .model import ATTENTION, Classifier, Critic, Policy
from .self_check import check_config, check_family
from .shard_files import write_weights

ModuleT = TypeVar("ModuleT", bound=nn.Module)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MAX_FILE_BYTES = 2 << 30
"""Largest file of an exported model, except for a single larger weight."""


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


def load_critic(path: str, *, dtype: str, engine: EngineConfig | None = None) -> Critic:
    """Loads a critic from any decoder; its scalar head starts at zero unless the folder has one.

    Args:
        path: a Hugging Face folder or hub id.
        dtype: data type of the weights.
        engine: as for `load_policy`.
    """
    loaded = _load_scored(path, num_labels=1, dtype=dtype, engine=engine)
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
        need_head=not fresh_head,
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
    engine: EngineConfig | None,
    need_head: bool = False,
) -> _Loaded:
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
        engine=engine,
        num_labels=num_labels,
    )
    if loaded.misses_head:
        if need_head:
            raise ValueError(
                f"model {path}: no classification head (score.weight) in it: "
                "train one with `verippo verifier`"
            )
        nn.init.zeros_(loaded.hf.score.weight)
    return loaded


def _load(
    auto: Any,
    path: str,
    *,
    dtype: str,
    engine: EngineConfig | None = None,
    **options: Any,
) -> _Loaded:
    """Loads a model, whose weights stay in their files if they are to be sharded.

    Any missing weight but the classification head is an error: transformers would fill it with
    random numbers.
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
        if engine and shards_parameters(engine) and (files := weight_files(path)):
            weights = LazyWeights(files, DTYPES[dtype])
            hf, info = _with_stand_ins(auto, path, config, weights, how)
            if not weights.cover(hf, info["missing_keys"]):
                weights = None
        if weights is None:
            hf, info = auto.from_pretrained(path, **how, **options)
    except Exception as error:  # damaged folders raise errors of many types
        raise ValueError(f"model {path}: cannot be loaded: {_one_line(error)}") from None
    finally:
        hf_logging.set_verbosity(verbosity)
    missing = set(info["missing_keys"])
    misshapen = {name for name, *_ in info["mismatched_keys"]}
    if missing - {"score.weight"} or misshapen:
        names = ", ".join(sorted(missing | misshapen)[:5])
        raise ValueError(
            f"model {path}: weights are missing or of another shape than {hf.config.model_type} "
            f"needs: {names}"
        )
    _silence_dropout(hf)
    return _Loaded(hf.eval(), bool(missing), weights)


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
    held = {
        name: torch.empty(getattr(parameter, "ds_shape", parameter.shape), device="meta")
        for name, parameter in hf.named_parameters()
    }
    stored = revert_weight_conversion(hf, dict(held))
    return stored.keys() == held.keys() and all(stored[name] is x for name, x in held.items())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
