"""Wilson's interval against published values and scipy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from verippo.core.report.statistics import wilson_interval


@pytest.mark.parametrize(
    ("successes", "num", "low", "high"),
    [
        # R. G. Newcombe, Statistics in Medicine 17 (1998), p. 857-872, Table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_interval_matches_published_values(successes, num, low, high):
    assert wilson_interval(successes, num) == pytest.approx((low, high), abs=5e-5)


@given(num=st.integers(1, 5000), data=st.data())
def test_wilson_interval_of_whole_counts_equals_scipys(num, data):
    successes = data.draw(st.integers(0, num))
    expected = binomtest(successes, num).proportion_ci(method="wilson")
    assert wilson_interval(successes, num) == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.parametrize(("successes", "num"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_impossible_proportions(successes, num):
    with pytest.raises(ValueError, match=f"got {successes} of {num}"):
        wilson_interval(successes, num)
