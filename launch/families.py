"""Writes docs/model_families.md: which families of models run, found out on a small model of each.

python -m verippo.launch.families [--check]
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
)
from transformers.utils import logging

from ..core.sampling.local_sampler import check_sampling
from ..core.training.model import Policy
from ..core.training.self_check import check_config, check_family, small_model

_PREFIX = re.compile(r".*?(?:cannot be used|cannot be sampled from|\)|model type \w+): (?!cannot)")
PAGE = Path(__file__).parents[1] / "docs" / "model_families.md"
NO_WINDOW = {"sliding_window": None}
FULL = {"layer_types": ["full_attention"] * 2}
MODEL_TYPES = """
    llama qwen2 qwen3 qwen2_moe qwen3_moe mistral mixtral gemma gemma2 gemma3_text phi phi3 smollm3
    olmo olmo2 olmo3 granite granitemoe cohere cohere2 glm glm4 glm4_moe deepseek_v2 deepseek_v3
    gpt_oss ernie4_5 ernie4_5_moe exaone4 hunyuan_v1_dense seed_oss minimax_m2 apertus arcee helium
    starcoder2 stablelm nemotron gpt2 gpt_neox gptj opt bloom falcon mpt bitnet llama4_text
    qwen3_next qwen3_5_text jamba falcon_h1 recurrent_gemma"""
FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in MODEL_TYPES.split()),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    ("mistral", NO_WINDOW),
    ("exaone4", {**FULL, **NO_WINDOW}),
)
"""Model types of transformers, and settings of a variant."""
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "moe_k": 2,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
HEAD = """\
# Model families

Which families of decoders run in SFT and PPO (as the policy), as a critic or verifier, and in the
local sampler. Each was tried with a small random model: its log-probs over packed sequences, and
those of sampled tokens, are transformers' own to 1e-3, or it is refused when it is loaded. Which
families sglang samples from is up to sglang.

<!-- Written by `python -m verippo.launch.families`, with transformers {version}; do not edit. -->

| model type | policy | critic, verifier | local sampler | why not |
|---|---|---|---|---|
"""


def small_config(model_type: str, variant: dict[str, Any]) -> PretrainedConfig:
    """A configuration of the family with small sizes, wherever it has such a field."""
    kind = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(kind)} | {*kind.attribute_map}
    fields = {name: size for name, size in SIZES.items() if name in known}
    return kind(**{**fields, **variant})


def describe(model_type: str, variant: dict[str, Any]) -> str:
    """The family's row of the table."""
    config = small_config(model_type, variant)
    settings = "".join(f", {name}: {value}" for name, value in variant.items())
    refused = _refusal(_check_family, config)
    checks = {"policy": _check_policy, "sampler": _check_sampler}
    reasons = {use: refused or _refusal(check, config) for use, check in checks.items()}
    no_critic = refused or type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    cells = ["no" if reason else "yes" for reason in (*reasons.values(),)]
    cells.insert(1, "no" if no_critic else "yes")
    why = reasons["policy"] or reasons["sampler"] or ""
    return f"| {model_type}{settings} | {' | '.join(cells)} | {why} |"


def _check_family(config: PretrainedConfig) -> None:
    check_config(config, config.model_type)
    check_family(AutoModelForCausalLM, config, config.model_type)


def _check_policy(config: PretrainedConfig) -> None:
    Policy(small_model(AutoModelForCausalLM, config))


def _check_sampler(config: PretrainedConfig) -> None:
    check_sampling(config, config.model_type)


def _refusal(check: Callable[[PretrainedConfig], None], config: PretrainedConfig) -> str | None:
    """The reason of a check's refusal, without figures that differ between machines."""
    try:
        check(config)
    except ValueError as error:
        reason = _PREFIX.sub("", str(error), count=1)
        return reason.partition(" by ")[0].partition(";")[0].replace("|", "")[:120]
    return None


def main(arguments: list[str]) -> int:
    """Writes the page; with --check, says whether it is up to date."""
    import transformers

    logging.set_verbosity_error()
    rows = [describe(model_type, variant) for model_type, variant in FAMILIES]
    page = HEAD.format(version=transformers.__version__) + "\n".join(sorted(rows)) + "\n"
    if "--check" in arguments:
        known = PAGE.read_text(encoding="utf-8").partition("|---|")[2]
        if known != page.partition("|---|")[2]:
            print(f"{PAGE} is out of date: run python -m verippo.launch.families")
            return 1
        return 0
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
