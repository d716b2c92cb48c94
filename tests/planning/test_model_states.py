"""Bytes of weights, gradients and optimizer states, worked by hand and compared with DeepSpeed's
published tables."""

from __future__ import annotations

import pytest

from verippo.core.planning.model_states import BUCKET, frozen_states, trained_states
from verippo.core.training.engine import EngineConfig

P, LARGEST = 1000, 100


def states(stage, *, dtype="bf16", offload="none", ranks=4, device="cuda", p=P):
    engine = EngineConfig(zero_stage=stage, dtype=dtype, offload=offload)
    return trained_states(p, LARGEST, engine, ranks=ranks, device=device)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer", "step"),
    [(1, 2000, 2000, 3000, 1000), (2, 2000, 500, 3000, 1000), (3, 500, 500, 3000, 1000)],
)
def test_bf16_states_of_a_rank_of_four(stage, weights, gradients, optimizer, step):
    found = states(stage)
    assert (found.weights, found.gradients) == (weights, gradients)
    assert (found.optimizer, found.step) == (optimizer, step)
    assert found.host == 0


def test_stage_0_shards_nothing_and_has_master_weights_in_bf16_alone():
    mixed = states(0, p=10**9)
    assert (mixed.weights, mixed.gradients, mixed.optimizer) == (2e9, 2e9, 12e9)
    assert mixed.step == 4e9
    plain = states(0, dtype="fp32", p=10**9)
    assert (plain.weights, plain.gradients, plain.optimizer) == (4e9, 4e9, 8e9)
    assert plain.step == 4 * BUCKET  # gradients flattened for the all-reduce


def test_fp32_has_a_master_copy_under_zero():
    found = states(3, dtype="fp32")
    assert (found.weights, found.gradients, found.optimizer) == (1000, 1000, 3000)


def test_buckets_take_their_whole_size_on_a_gpu_and_what_is_written_on_cpu():
    assert states(2).bucket == 2 * BUCKET
    assert states(2, device="cpu").bucket == 2 * P
    assert states(2, device="cpu").step == 3 * 1000  # gradient, and two tensors of Adam's


def test_zero_3_keeps_gradients_and_gathers_weights():
    found = states(3)
    assert found.gradients_stay
    assert found.gathered == 2 * P
    assert states(3, p=10**10).gathered == 2 * (10**9 + LARGEST)
    assert states(3, ranks=1).gathered == 0
    assert not states(2).gradients_stay


def test_offloaded_optimizer_lies_in_host_memory():
    found = states(3, offload="optimizer")
    # master 4, moments 8, gradients 4 in fp32 and 2 in bf16
    assert found.host == 18 * P / 4
    assert (found.weights, found.optimizer, found.gradients, found.step) == (500, 0, 0, 0)
    second = states(2, offload="optimizer")
    assert second.host == 20 * P / 4  # and a copy of the new weights
    assert (second.weights, second.gradients) == (2000, 0)


def test_everything_offloaded_leaves_gathered_weights():
    found = states(3, offload="all")
    assert found.host == 20 * P / 4
    assert (found.weights, found.optimizer) == (0, 0)
    assert found.gathered == 2 * P


def test_frozen_models():
    def frozen(stage, *, ranks, offload="none"):
        engine = EngineConfig(zero_stage=stage, offload=offload)
        return frozen_states(P, engine, ranks=ranks)

    assert frozen(2, ranks=4).weights == 2000
    assert frozen(3, ranks=1).weights == 2000
    assert (frozen(3, ranks=4).weights, frozen(3, ranks=4).gathered) == (500, 2000)
    everything = frozen(3, ranks=4, offload="all")
    assert (everything.weights, everything.host) == (0, 500)


# the tables of DeepSpeed's page on memory requirements, for t5-3b: 2,851 M parameters, 8 GPUs
T5_3B = 2_851_000_000
GIB = 2**30


def test_zero_2_against_deepspeeds_table():
    """15.93 GB: 4 bytes a parameter for weights and gradients, and 16 sharded over 8 GPUs.

    Gradients are counted whole there, here sharded, as ZeRO-2 has them outside of its bucket; and
    fp32 gradients of the step apart.
    """
    found = states(2, ranks=8, p=T5_3B)
    total = found.weights + found.optimizer + found.gradients + found.step
    whole_gradients = 2 * T5_3B - found.gradients
    assert (total + whole_gradients) / GIB == pytest.approx(15.93, abs=0.01)
    offloaded = states(2, ranks=8, offload="optimizer", p=T5_3B)
    assert offloaded.weights / GIB == pytest.approx(5.31, abs=0.01)


def test_zero_3_against_deepspeeds_table():
    """6.09 GB: 18 bytes a parameter over 8 GPUs and the largest layer's 4; 63.72 GB a host."""
    found = states(3, ranks=8, p=T5_3B)
    total = found.weights + found.optimizer + found.step
    largest_layer = 4 * 32e6
    assert (total + largest_layer) / GIB == pytest.approx(6.09, abs=0.01)
    offloaded = states(3, ranks=8, offload="optimizer", p=T5_3B)
    assert (offloaded.weights + largest_layer) / GIB == pytest.approx(0.78, abs=0.01)
    # 16 bytes a parameter and half as much again; the bf16 gradients are not counted there
    host = offloaded.host - 2 * T5_3B / 8
    assert host * 8 * 1.5 / GIB == pytest.approx(63.72, abs=0.01)
