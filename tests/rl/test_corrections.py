from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verippo.rl.corrections import adaptive_lambda, sampler_correction

LN2 = math.log(2)
# two sequences of 4 and 3 tokens; the responses are tokens 1..3 and 5..6
CU_SEQLENS = torch.tensor([0, 4, 7], dtype=torch.int32)
MASK = torch.tensor([0, 1, 1, 1, 0, 1, 1]).bool()
# log ratios on the mask: ln 2, ln 4, -ln 2 (product 4, geometric mean 4^(1/3)) and -ln 4, 0
LOG_RATIO = torch.tensor([math.nan, LN2, 2 * LN2, -LN2, math.inf, -2 * LN2, 0.0])


def corrected(level, mode, low=0.5, high=2.0):
    return sampler_correction(
        LOG_RATIO - 1.0,
        torch.full((7,), -1.0),
        MASK,
        CU_SEQLENS,
        level=level,
        mode=mode,
        low=low,
        high=high,
    )


def test_adaptive_lambda_by_hand():
    lengths = torch.tensor([1, 20, 40, 1000])
    assert adaptive_lambda(lengths).tolist() == pytest.approx([0.0, 0.0, 0.5, 0.98])
    assert adaptive_lambda(lengths, alpha=1.0).tolist() == pytest.approx([0.0, 0.95, 0.975, 0.999])


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_adaptive_lambda_needs_a_positive_alpha(alpha):
    with pytest.raises(ValueError, match="alpha"):
        adaptive_lambda(torch.tensor([3]), alpha=alpha)


GEOMETRIC = 4 ** (1 / 3)


@pytest.mark.parametrize(
    ("level", "mode", "expected", "touched"),
    [
        ("token", "truncate", [0, 2, 2, 0.5, 0, 0.25, 1], 1),
        ("token", "clip", [0, 2, 2, 0.5, 0, 0.5, 1], 2),
        ("token", "mask", [0, 2, 0, 0.5, 0, 0, 1], 2),
        ("sequence", "truncate", [0, 2, 2, 2, 0, 0.25, 0.25], 3),
        ("sequence", "clip", [0, 2, 2, 2, 0, 0.5, 0.5], 5),
        ("sequence", "mask", [0, 0, 0, 0, 0, 0, 0], 5),
        ("geometric", "truncate", [0, GEOMETRIC, GEOMETRIC, GEOMETRIC, 0, 0.5, 0.5], 0),
    ],
)
def test_sampler_correction_by_hand(level, mode, expected, touched):
    result = corrected(level, mode, low=0.499, high=2.0001 if mode == "mask" else 2.0)
    assert result.weights.tolist() == pytest.approx(expected, abs=2e-3)
    assert int(result.num_touched) == touched
    n, square_sum = 5, sum(w * w for w in expected)
    size = sum(expected) ** 2 / (n * square_sum) if square_sum else 0.0
    assert float(result.effective_sample_size) == pytest.approx(size, abs=2e-3)


def test_equal_logprobs_get_weight_one_at_every_level():
    same = torch.randn(7)
    for level in ("token", "sequence", "geometric"):
        result = sampler_correction(
            same, same, MASK, CU_SEQLENS, level=level, mode="mask", low=0.9, high=1.1
        )
        assert torch.equal(result.weights, MASK.float())
        assert float(result.effective_sample_size) == pytest.approx(1.0)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    level=st.sampled_from(["token", "sequence", "geometric"]),
    mode=st.sampled_from(["truncate", "clip", "mask"]),
    seed=st.integers(0, 2**16),
)
def test_sampler_correction_equals_its_loop_in_float64(lengths, level, mode, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    mask = torch.rand(total, generator=generator) < 0.7
    old = torch.randn(total, generator=generator, dtype=torch.float64)
    sampled = old + 0.5 * torch.randn(total, generator=generator, dtype=torch.float64)
    result = sampler_correction(
        old, sampled, mask, cu_seqlens, level=level, mode=mode, low=0.6, high=1.7
    )
    expected = [0.0] * total
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        kept = [i for i in range(start, end) if mask[i]]
        product = math.prod(math.exp(old[i] - sampled[i]) for i in kept)
        for i in kept:
            u = {
                "token": math.exp(old[i] - sampled[i]),
                "sequence": product,
                "geometric": product ** (1 / len(kept)),
            }[level]
            bounded = {"truncate": min(u, 1.7), "clip": min(max(u, 0.6), 1.7)}
            expected[i] = bounded.get(mode, u if 0.6 <= u <= 1.7 else 0.0)
    assert result.weights.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": "batch"}, "level='batch'"),
        ({"mode": "drop"}, "mode='drop'"),
        ({"low": 3.0}, "low=3.0, high=2.0"),
        ({"low": 0.0, "high": 0.0}, "high above 0"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    given = {"level": "token", "mode": "clip", "low": 0.5, "high": 2.0} | changes
    with pytest.raises(ValueError, match=message):
        corrected(given["level"], given["mode"], given["low"], given["high"])
