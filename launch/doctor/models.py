"""Checks of the models: family, weights, vocabulary, chat template, stop tokens, context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ...core.sampling.local_sampler import check_sampling
from ...core.text.chat import end_of_turn_id, render_text
from ...core.text.stop_tokens import stop_token_ids
from ...core.text.verifier_text import load_template, verifier_input
from ...core.training.pretrained import (
    HEAD,
    check_embedding,
    check_same_vocabulary,
    context_length,
    load_config,
    load_tokenizer,
)
from ...core.training.run_config import RunConfig
from ...core.training.self_check import check_config, check_family
from ...rl.config import PPOConfig
from ...rl.setup import check_context
from ...sft.config import SFTConfig, TrainingConfig, VerifierTrainingConfig
from .findings import Caution, Report
from .small_model import shrunk
from .weight_files import weight_shapes, weights_folder

Kind = Literal["language model", "critic", "classifier", "base of a classifier"]
QUESTION = "A patient has fever and a stiff neck. What is the most likely diagnosis?"
tokenizer_of = cache(load_tokenizer)


@dataclass(frozen=True, kw_only=True)
class Role:
    """A model of a run."""

    name: str
    path: str
    kind: Kind = "language model"

    @property
    def auto(self) -> Any:
        """Class that loads it."""
        causal = self.kind == "language model"
        return AutoModelForCausalLM if causal else AutoModelForSequenceClassification


def roles(config: RunConfig) -> list[Role]:
    """The models of a run, the trained policy first; a model that has two roles is listed once."""
    if isinstance(config, VerifierTrainingConfig):
        return [Role(name="model", path=config.model, kind="base of a classifier")]
    if isinstance(config, TrainingConfig):
        return [Role(name="model", path=config.model)]
    assert isinstance(config, PPOConfig)
    found = [Role(name="policy", path=config.policy)]
    if config.advantage == "gae":
        found.append(Role(name="critic", path=config.critic_path, kind="critic"))
    for name, path in (("reference", config.reference), ("baseline", config.baseline)):
        if path and path != config.policy:
            found.append(Role(name=name, path=path))
    if config.verifier.kind == "classifier":
        found.append(Role(name="verifier", path=str(config.verifier.model), kind="classifier"))
    return found


def num_parameters(role: Role) -> int:
    """Number of parameters of a model, from its configuration alone; tied ones count once."""
    config = load_config(role.path)
    config.num_labels = 1 if role.kind == "critic" else 2
    with torch.device("meta"):
        return sum(p.numel() for p in role.auto.from_config(config).parameters())


def check_models(report: Report, config: RunConfig) -> None:
    """Checks every model of a run, without loading its weights."""
    report.group = "models"
    for role in roles(config):
        report.check(role.name, partial(_family, role, config))
        report.check(f"{role.name}'s weights", partial(_weights, role, config))
        report.check(f"{role.name}'s tokenizer", partial(_tokenizer, role, config))
    if isinstance(config, (PPOConfig, SFTConfig)):
        path = roles(config)[0].path
        report.check("chat template", partial(_chat_template, config, path))
        report.check("stop tokens", partial(_stop_tokens, path))
    if isinstance(config, PPOConfig):
        report.check("context", partial(_policy_context, config))
        if config.verifier.kind == "classifier":
            path = str(config.verifier.model)
            report.check("verifier's input", partial(_verifier_input, path, config.verifier))
    elif isinstance(config, TrainingConfig):
        find = partial(_fits, config.model, "max_seq_len", config.max_seq_len)
        report.check("context", find)
    if isinstance(config, VerifierTrainingConfig):
        report.check("verifier's input", partial(_verifier_input, config.model, config))


def _family(role: Role, config: RunConfig) -> str:
    model = load_config(role.path)
    check_config(model, role.path)
    _checked_small(partial(check_family, role.auto), model, role.path)
    on_this_host = isinstance(config, PPOConfig) and config.sampler.kind == "local"
    if role.name in ("policy", "baseline") and on_this_host:
        _checked_small(check_sampling, model, role.path)
    return f"{role.path}: {model.model_type}, {num_parameters(role) / 1e6:,.1f} M parameters"


def _checked_small(check: Any, model: Any, path: str) -> None:
    """Checks a family on its smallest model, or at its own size if it cannot be made so small."""
    try:
        check(shrunk(model), path)
    except ValueError:
        check(model, path)


def _weights(role: Role, config: RunConfig) -> str:
    folder = weights_folder(role.path)
    if folder is None:
        if config.offline:
            raise ValueError(f"{role.path}: not on this host, and offline=true: download it before")
        load_config(role.path)
        raise Caution(f"{role.path}: not on this host; each host downloads it when the run starts")
    shapes = weight_shapes(folder, role.path)
    head = shapes.get(HEAD)
    kept = isinstance(config, PPOConfig) and config.critic_head == "kept"
    fresh = isinstance(config, PPOConfig) and (
        config.critic_head == "fresh" or config.critic == "verifier"
    )
    if role.kind == "critic" and not fresh:
        if kept and shapes and not head:
            raise ValueError(f"{role.path}: has no head ({HEAD}): give critic_head=fresh")
        if head and head[0] != 1:
            raise ValueError(
                f"{role.path}: its head has {head[0]} outputs, a critic's has one: give "
                "critic_head=fresh"
            )
    if role.kind == "classifier" and shapes and not head:
        raise ValueError(f"{role.path}: has no head ({HEAD}): train one with `verippo verifier`")
    if "classifier" in role.kind and head and head[0] != 2:
        raise ValueError(
            f"{role.path}: its head has {head[0]} classes, the verifier's has two (wrong, right): "
            "train one with `verippo verifier`"
        )
    return f"{len(shapes)} weights in {folder}" if shapes else f"pickled weights in {folder}"


def _tokenizer(role: Role, config: RunConfig) -> str:
    if isinstance(config, PPOConfig) and role.kind != "classifier" and role.path != config.policy:
        check_same_vocabulary(config.policy, role.path)
    tokenizer = tokenizer_of(role.path)
    model = load_config(role.path)
    check_embedding(model, tokenizer, role.path)
    return f"{len(tokenizer)} tokens, {model.get_text_config().vocab_size} embeddings"


def _chat_template(config: PPOConfig | SFTConfig, path: str) -> str:
    tokenizer = tokenizer_of(path)
    system = config.system_prompt
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": QUESTION})
    text = render_text(tokenizer, messages, add_generation_prompt=True)
    if isinstance(config, SFTConfig):
        end_of_turn_id(tokenizer)  # raises where an answer cannot be trained on
    if not tokenizer.chat_template:
        raise Caution(
            f"{path} has none: the built-in one is used, which writes {text!r}: if the model was "
            "trained with another one, put it into its tokenizer_config.json"
        )
    return repr(text)


def _stop_tokens(path: str) -> str:
    tokenizer: Any = tokenizer_of(path)
    ids = stop_token_ids(path, tokenizer)
    return ", ".join(f"{n} {tokenizer.convert_ids_to_tokens(n)!r}" for n in ids)


def _policy_context(config: PPOConfig) -> str:
    context = check_context(config, load_config(config.policy))
    longest = config.max_prompt_tokens + config.sampling.max_new_tokens
    return f"{longest} tokens at most, of {context or 'no limit that the policy names'}"


def _fits(path: str, option: str, tokens: int) -> str:
    context = context_length(load_config(path))
    if context and tokens > context:
        raise Caution(
            f"{option}={tokens} is over the context of {path} ({context}): longer rows would be "
            f"read as no row in its training was: lower it to {context}"
        )
    return f"{tokens} tokens at most, of {context or 'no limit that the model names'}"


def _verifier_input(path: str, options: Any) -> str:
    template = load_template(options.template)
    limit = getattr(options, "max_tokens", None) or options.max_seq_len
    ids, _ = verifier_input(
        tokenizer_of(path),
        "RESPONSE",
        "REFERENCE",
        template=template,
        max_tokens=limit,
    )
    if hasattr(options, "max_tokens"):
        _fits(path, "verifier.max_tokens", limit)
    return f"{tokenizer_of(path).decode(ids)!r}"


def model_paths(config: RunConfig) -> Iterator[str]:
    """Paths of all models of a run, each once."""
    yield from dict.fromkeys(role.path for role in roles(config))
