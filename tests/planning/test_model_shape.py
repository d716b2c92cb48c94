"""Sizes of models read from config.json alone."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from verippo.core.planning.model_shape import model_shape
from verippo.core.training.pretrained import load_config

# as the models' pages on the hub state them
NUMBERS = {
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "llama-3b": 3_212_749_824,
    "qwen-0.5b": 494_032_768,
    "qwen-7b": 7_615_616_512,
    "qwen-72b": 72_706_203_648,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_parameters_are_the_published_number(name, config_folder):
    shape = model_shape(load_config(str(config_folder(name))), name)
    assert shape.parameters == shape.active_parameters == NUMBERS[name]


def test_sizes_of_llama_8b(config_folder):
    shape = model_shape(load_config(str(config_folder("llama-8b"))), "x")
    assert (shape.layers, shape.hidden, shape.intermediate) == (32, 4096, 14336)
    assert (shape.query_size, shape.kv_size) == (4096, 1024)
    assert shape.embedding == 128256 * 4096
    assert shape.decoder_parameters == 8_030_261_248 - 128256 * 4096
    assert (shape.tied, shape.qk_norm, shape.dtype) == (False, False, "bf16")


def test_a_tied_head_is_no_parameter_of_its_own(config_folder):
    shape = model_shape(load_config(str(config_folder("llama-3b"))), "x")
    assert shape.tied
    assert shape.decoder_parameters == shape.parameters


def test_norms_of_queries_and_keys_and_dtype_are_seen():
    config = AutoConfig.for_model(
        "qwen3",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        dtype="float32",
    )
    shape = model_shape(config, "x")
    assert shape.qk_norm
    assert (shape.query_size, shape.dtype) == (128, "fp32")


def test_a_token_passes_only_the_chosen_experts():
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=100,
        hidden_size=64,
        intermediate_size=1000,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    shape = model_shape(config, "x")
    # two layers of 8 experts with three matrices of 64 x 32 each; two of eight are chosen
    assert shape.parameters - shape.active_parameters == 2 * 6 * 3 * 64 * 32
    assert shape.intermediate == 64


def test_a_model_that_generates_nothing_is_refused():
    with pytest.raises(ValueError, match="model x: its sizes cannot be read"):
        model_shape(AutoConfig.for_model("clip"), "x")
