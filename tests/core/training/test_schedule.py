import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verippo.core.training.schedule import learning_rate


def rates(kind, *, total_steps=10, warmup_ratio=0.2, peak=1.0):
    options = {"peak": peak, "total_steps": total_steps, "warmup_ratio": warmup_ratio, "kind": kind}
    return [learning_rate(step, **options) for step in range(total_steps + 2)]


def test_linear_worked_by_hand():
    # two steps up, then eight down: 1, 7/8, ... and zero from the end on
    expected = [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    assert rates("linear") == pytest.approx(expected, abs=1e-12)


def test_cosine_worked_by_hand():
    # (1 + cos(pi k / 8)) / 2 for k = 0..8 after two steps up; cos(pi/4) = 1/sqrt(2)
    got = rates("cosine")
    assert got[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert got[4] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert got[6] == pytest.approx(0.5)
    assert got[10:] == pytest.approx([0.0, 0.0], abs=1e-12)


def test_constant_stays_at_the_peak_after_the_climb():
    assert rates("constant", peak=3.0) == pytest.approx([1.5] + [3.0] * 11)


def test_without_warm_up_the_first_step_has_the_peak():
    for kind in ("linear", "cosine", "constant"):
        assert rates(kind, warmup_ratio=0.0)[0] == 1.0


def test_warm_up_rounds_up_to_whole_steps():
    # 5 % of 30 steps are 1.5, so two: half the peak, then all of it
    assert rates("constant", total_steps=30, warmup_ratio=0.05)[:3] == [0.5, 1.0, 1.0]


@given(
    st.sampled_from(["linear", "cosine", "constant"]),
    st.integers(1, 200),
    st.floats(0, 1),
    st.floats(1e-8, 1.0),
)
def test_every_step_of_a_run_has_a_rate_above_zero_and_at_most_the_peak(
    kind, total_steps, warmup_ratio, peak
):
    got = rates(kind, total_steps=total_steps, warmup_ratio=warmup_ratio, peak=peak)[:total_steps]
    assert all(0 < rate <= peak for rate in got)
    top = got.index(max(got))
    assert got[: top + 1] == sorted(got[: top + 1])
    assert got[top:] == sorted(got[top:], reverse=True)


@given(st.integers(0, 50), st.floats(1e-6, 1e3))
def test_the_rate_scales_with_the_peak(step, peak):
    options = {"total_steps": 50, "warmup_ratio": 0.1, "kind": "cosine"}
    assert learning_rate(step, peak=peak, **options) == pytest.approx(
        peak * learning_rate(step, peak=1.0, **options)
    )
