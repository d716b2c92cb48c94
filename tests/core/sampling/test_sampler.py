import hashlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verippo.core.sampling.sampler import Completion, SamplingParams, draw_seed

SEED = 7427581908883980892
parts = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5)


def test_draw_seed_is_stable_across_machines_and_versions():
    # computed independently: 8-byte blake2b of the little-endian 64-bit integers, read as a
    # little-endian integer without the top bit
    packed = b"".join(part.to_bytes(8, "little", signed=True) for part in (42, 7, 3, 0))
    assert int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") // 2 == SEED
    assert draw_seed(42, 7, 3, 0) == SEED


def test_a_seed_of_more_than_64_bits_is_refused():
    with pytest.raises(ValueError, match="^seed=9223372036854775808: must fit 64 bits$"):
        draw_seed(2**63, 1)


@given(parts)
def test_draw_seed_fits_in_63_bits(numbers):
    assert 0 <= draw_seed(*numbers) < 2**63


@given(parts, parts)
def test_different_parts_give_different_seeds(first, second):
    assert (draw_seed(*first) == draw_seed(*second)) == (first == second)


def test_order_and_number_of_parts_count():
    assert len({draw_seed(1, 2), draw_seed(2, 1), draw_seed(1, 2, 0), draw_seed(0, 1, 2)}) == 4


@pytest.mark.parametrize("temperature", [-0.1, math.nan, math.inf])
def test_a_temperature_that_is_no_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match=f"sampling.temperature={temperature}: must be 0 or more"):
        SamplingParams(temperature=temperature)


def test_fewer_than_one_token_is_refused():
    with pytest.raises(ValueError, match="sampling.max_new_tokens=0: must be at least 1"):
        SamplingParams(max_new_tokens=0)
    assert SamplingParams(temperature=0, max_new_tokens=1).temperature == 0


def test_there_is_no_top_p_and_no_top_k():
    for option in ("top_p", "top_k"):
        with pytest.raises(TypeError, match=option):
            SamplingParams(**{option: 1})


def test_a_completion_prints_without_its_logprobs():
    assert "0.25" not in repr(Completion(token_ids=[1], logprobs=[-0.25], finish_reason="stop"))
