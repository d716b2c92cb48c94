"""Bytes of activations: worked by hand, and against what autograd saves in a real pass."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from verippo.core.planning.activations import (
    forward_activations,
    kv_bytes_per_token,
    layer_activations,
    local_sampler_memory,
    logprob_memory,
    training_activations,
)
from verippo.core.planning.model_shape import ModelShape, model_shape
from verippo.core.training.model import ATTENTION, hidden_states
from verippo.core.training.packing import pack

SHAPE = ModelShape(
    name="x",
    parameters=1000,
    active_parameters=1000,
    layers=3,
    hidden=8,
    intermediate=20,
    heads=2,
    kv_heads=1,
    head_dim=4,
    vocabulary=100,
    tied=False,
)


def test_a_layer_in_bf16_by_hand():
    # norms: 2 x 8 x (4 + 2 + 2) + 8 = 136; attention: q 8 and out 8, k and v 4 each: 24 x 2 = 48,
    # log-sum-exps 2 x 4 = 8; MLP: 4 x 20 x 2 = 160
    assert layer_activations(SHAPE, 10, size=2) == 10 * (136 + 56 + 160)
    assert layer_activations(SHAPE, 10, size=2, device="cpu") == 10 * (136 + 72 + 160)


def test_checkpointing_stores_inputs_and_one_layer():
    layer = 10 * (136 + 56 + 160)
    # gradients: 2 x 2 x 20 + 2 x 6 x 8 = 176; last norm: 8 x 8 = 64
    rest = 10 * (176 + 64)
    options = {"size": 2, "checkpointing": True}
    assert training_activations(SHAPE, 10, **options) == 3 * 10 * 2 * 8 + layer + rest
    options["checkpointing"] = False
    assert training_activations(SHAPE, 10, **options) == 3 * layer + rest


def test_a_pass_without_gradients_holds_three_tensors_of_the_mlp():
    assert forward_activations(SHAPE, 10, size=2) == 10 * 2 * (2 * 8 + 3 * 20)


def test_logprobs_take_a_chunk_and_the_heads_gradient():
    # one chunk of 512 x 100 in fp32; 600 hidden states of 8 in bf16
    chunk, hidden = 4 * 512 * 100, 600 * 8 * 2
    assert logprob_memory(SHAPE, 600, size=2, backward=False) == chunk + hidden
    both = logprob_memory(SHAPE, 600, size=2, backward=False, entropy=True)
    assert both == 2 * chunk + hidden
    # gradient of the head in fp32 and cast to bf16, and that of the hidden states
    backward = logprob_memory(SHAPE, 600, size=2, backward=True)
    assert backward == chunk + 2 * hidden + 6 * 800
    assert logprob_memory(SHAPE, 5, size=4, backward=False) == 4 * 5 * 100 + 5 * 8 * 4


def test_cache_of_llama_8b_is_128_kib_a_token(config_folder):
    config = AutoConfig.from_pretrained(config_folder("llama-8b"))
    shape = model_shape(config, "x")
    assert kv_bytes_per_token(shape, size=2) == 131072  # 2 x 32 layers x 1024 x 2 bytes
    cache, work = local_sampler_memory(shape, slots=16, prompt_tokens=1000, new_tokens=1000, size=2)
    assert cache == 16 * 2000 * 131072
    assert work == 16000 * 2 * (2 * 4096 + 3 * 14336)


def saved_bytes(family: str, dtype: torch.dtype, layers: int, tokens: int, **sizes: int):
    """Bytes of all tensors that autograd saves in the decoder's pass, without weights."""
    config = AutoConfig.for_model(
        family,
        vocab_size=97,
        num_hidden_layers=layers,
        attn_implementation=ATTENTION,
        **sizes,
    )
    hf = AutoModelForCausalLM.from_config(config, dtype=dtype)
    half = tokens // 2
    row = SimpleNamespace(prompt_ids=[1], response_ids=[2] * (half - 1))
    weights = {p.untyped_storage().data_ptr() for p in hf.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states(hf, pack([row, row]))
    return sum(size for size, _ in saved.values()), model_shape(config, family)


@settings(max_examples=12, deadline=None)
@given(
    family=st.sampled_from(["llama", "qwen2", "qwen3"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([8, 16]),
    intermediate=st.integers(40, 90),
    tokens=st.integers(10, 40).map(lambda half: 2 * half),
)
def test_a_layer_is_what_autograd_saves(family, dtype, kv_heads, head_dim, intermediate, tokens):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": intermediate,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }
    two, _ = saved_bytes(family, dtype, 2, tokens, **sizes)
    three, shape = saved_bytes(family, dtype, 3, tokens, **sizes)
    size = 2 if dtype == torch.bfloat16 else 4
    planned = layer_activations(shape, tokens, size=size, device="cpu")
    assert three - two == pytest.approx(planned, rel=0.02)
