"""Operations, traffic and seconds, worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoConfig

from verippo.core.planning.duration import (
    Speed,
    decode_seconds,
    forward_flops,
    gather_bytes,
    optimizer_seconds,
    reduce_bytes,
    training_flops,
)
from verippo.core.planning.model_shape import ModelShape, model_shape

SHAPE = ModelShape(
    name="x",
    parameters=1000,
    active_parameters=1000,
    layers=2,
    hidden=10,
    intermediate=20,
    heads=2,
    kv_heads=1,
    head_dim=5,
    vocabulary=30,
    tied=False,
)
SPEED = Speed(flops=1e6, memory=1e4, link=1e3, pcie=1e3, host=1e5, disk=1e2)


def test_a_forward_pass_multiplies_everything_but_the_embedding():
    # 1000 - 300 parameters; attention 2 layers x 2 x 10 x 50 / token
    assert forward_flops(SHAPE, 3, context=50) == 3 * (2 * 700 + 2 * 2 * 10 * 50)
    assert forward_flops(SHAPE, 3, context=0, head=False) == 3 * 2 * 400
    tied = replace(SHAPE, tied=True)
    assert forward_flops(tied, 1, context=0) == 2 * 1000
    assert forward_flops(tied, 1, context=0, head=False) == 2 * 700


def test_training_is_three_passes_or_four():
    options = {"context": 50, "checkpointing": False}
    one = forward_flops(SHAPE, 7, context=50)
    assert training_flops(SHAPE, 7, **options) == 3 * one
    assert training_flops(SHAPE, 7, **options | {"checkpointing": True}) == 4 * one


def test_llama_8b_needs_the_published_operations(config_folder):
    """torchtitan: 5,762 tokens a second and GPU are 33 % MFU of 989 TFLOP/s, at 8,192 tokens."""
    shape = model_shape(AutoConfig.from_pretrained(config_folder("llama-8b")), "x")
    per_token = training_flops(shape, 1, context=8192, checkpointing=False)
    assert 5762 * per_token / 989e12 == pytest.approx(0.33, abs=0.04)


def test_decoding_reads_weights_and_cache():
    # 2 x 1000 bytes of weights, 4 responses x 25 tokens x (2 layers x 2 x 5 x 2 bytes)
    seconds = decode_seconds(SHAPE, slots=4, context=25, size=2, speed=SPEED)
    assert seconds == pytest.approx((2000 + 4 * 25 * 40) / 1e4)
    shared = decode_seconds(
        SHAPE, slots=4, context=25, size=2, speed=SPEED, tensor_parallel=2, launch=0.5
    )
    assert shared == pytest.approx(0.3 + 0.5)


def test_traffic_of_zero():
    sharded = {"size": 2, "ranks": 4}
    assert gather_bytes(1000, **sharded, stage=3, passes=3) == 3 * 2000 * 0.75
    assert gather_bytes(1000, **sharded, stage=2, passes=3) == 0
    assert reduce_bytes(1000, **sharded, stage=3) == 1500
    assert reduce_bytes(1000, **sharded, stage=1) == 3000
    assert reduce_bytes(1000, size=2, ranks=1, stage=3) == 0


def test_optimizer_step_reads_and_writes_28_bytes_a_parameter():
    options = {"ranks": 4, "ranks_per_host": 2, "speed": SPEED}
    assert optimizer_seconds(1000, **options, offloaded=False) == pytest.approx(7000 / 1e4)
    both = 7000 * 2 / 1e5 + 1000 / 1e3
    assert optimizer_seconds(1000, **options, offloaded=True) == pytest.approx(both)
