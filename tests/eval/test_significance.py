"""Intervals, tests and rates against hand-worked values, scipy and statsmodels."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.proportion import proportion_confint

from verippo.eval.significance import (
    accuracy_interval,
    agreement_rate,
    bootstrap_difference,
    length_statistics,
    majority_vote,
    mcnemar,
    pass_at_k,
    position_bias,
)

LETTERS = st.sampled_from(["A", "B", "C", None])


@given(right=st.lists(st.booleans(), min_size=1, max_size=300))
def test_one_run_has_wilsons_interval(right):
    found = accuracy_interval([[each] for each in right])
    low, high = proportion_confint(sum(right), len(right), alpha=0.05, method="wilson")
    assert found.value == pytest.approx(np.mean(right), abs=1e-9)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))


@given(right=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=2, max_size=60))
def test_interval_of_runs_is_wilsons_at_the_clustered_error(right):
    found = accuracy_interval(right)
    groups = np.repeat(np.arange(len(right)), 3)
    flat = np.array(right, dtype=float).ravel()
    clusters = {"groups": groups, "use_correction": False}
    (se,) = OLS(flat, np.ones(len(flat))).fit(cov_type="cluster", cov_kwds=clusters).bse
    p = flat.mean()
    num = p * (1 - p) / se**2 if se > 1e-9 else len(right)
    low, high = proportion_confint(p * num, num, alpha=0.05, method="wilson")
    expected = (p, max(0, low), min(1, high))
    assert dataclasses.astuple(found) == pytest.approx(expected, abs=1e-9)


def test_repeated_answers_do_not_narrow_the_interval():
    once, five = [[True]] * 60 + [[False]] * 40, [[True] * 5] * 60 + [[False] * 5] * 40
    expected = dataclasses.astuple(accuracy_interval(once))
    assert dataclasses.astuple(accuracy_interval(five)) == pytest.approx(expected, abs=1e-12)


def test_independent_runs_narrow_the_interval_like_more_items():
    rng = np.random.default_rng(0)
    found = accuracy_interval((rng.random((2000, 4)) < 0.7).tolist())
    low, high = proportion_confint(8000 * found.value, 8000, alpha=0.05, method="wilson")
    assert found.high - found.low == pytest.approx(high - low, rel=0.05)


def test_interval_of_runs_covers_the_true_accuracy_95_percent():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(1000):  # each item has its own chance of being answered: mean 0.6
        chance = rng.beta(1.2, 0.8, size=150)
        found = accuracy_interval((rng.random((150, 5)) < chance[:, None]).tolist())
        held += found.low <= 0.6 <= found.high
    assert 930 <= held <= 970


def test_pass_at_k_of_one_right_run_of_four():
    assert pass_at_k([[True, False, False, False]], 1) == pytest.approx(1 / 4)
    # 3 of the 6 pairs include the right run
    assert pass_at_k([[True, False, False, False]], 2) == pytest.approx(1 / 2)
    assert pass_at_k([[True, False, False, False], [False] * 4], 4) == pytest.approx(1 / 2)


@given(
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6),
    st.integers(1, 5),
)
def test_pass_at_k_is_the_share_of_draws_with_a_right_run(right, k):
    shares = [np.mean([any(draw) for draw in itertools.combinations(runs, k)]) for runs in right]
    assert pass_at_k(right, k) == pytest.approx(np.mean(shares), abs=1e-9)
    chances = [1 - stats.hypergeom.pmf(0, 5, sum(runs), k) for runs in right]
    assert pass_at_k(right, k) == pytest.approx(np.mean(chances), abs=1e-9)


def test_pass_at_k_refuses_more_than_the_runs():
    with pytest.raises(ValueError, match="k=3 of 2 runs"):
        pass_at_k([[True, False]], 3)


@pytest.mark.parametrize(
    ("letters", "vote"),
    [
        ("ABB", "B"),
        ("BA", "B"),
        ("CAAC", "C"),
        ([None, None, "A"], "A"),
        ([None, None], None),
        ([], None),
    ],
)
def test_majority_vote_breaks_ties_by_the_first_letter(letters, vote):
    assert majority_vote(letters) == vote


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_mcnemar_is_the_exact_binomial_test(pairs):
    first, second = zip(*pairs, strict=True)
    found = mcnemar(first, second)
    table = np.zeros((2, 2))
    for a, b in pairs:
        table[int(not a), int(not b)] += 1
    assert (found.only_first, found.only_second) == (table[0, 1], table[1, 0])
    if table[0, 1] + table[1, 0]:
        assert found.p_value == pytest.approx(
            statsmodels_mcnemar(table, exact=True).pvalue, abs=1e-9
        )
    else:
        assert found.p_value == 1


def test_mcnemar_by_hand_and_with_many_items():
    assert mcnemar([True] * 5 + [False], [False] * 5 + [True]).p_value == pytest.approx(
        2 * (1 + 6) / 64
    )
    many = mcnemar([True] * 3000 + [False] * 2500, [False] * 3000 + [True] * 2500)
    assert many.p_value == pytest.approx(stats.binomtest(2500, 5500).pvalue, rel=1e-9)


def test_bootstrap_difference_matches_scipys_and_is_seeded():
    rng = np.random.default_rng(2)
    first, second = rng.random(400) < 0.7, rng.random(400) < 0.6
    found = bootstrap_difference(first.tolist(), second.tolist(), seed=3)
    theirs = stats.bootstrap(
        (first.astype(float), second.astype(float)),
        lambda a, b, axis: (a - b).mean(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(4),
    ).confidence_interval
    assert found.value == pytest.approx(first.mean() - second.mean(), abs=1e-12)
    assert (found.low, found.high) == (
        pytest.approx(theirs.low, abs=0.006),
        pytest.approx(theirs.high, abs=0.006),
    )
    assert found == bootstrap_difference(first.tolist(), second.tolist(), seed=3)
    assert found != bootstrap_difference(first.tolist(), second.tolist(), seed=5)


def test_bootstrap_difference_is_antisymmetric():
    none = bootstrap_difference([1, 0, 1], [1, 0, 1], seed=0)
    assert dataclasses.astuple(none) == (0, 0, 0)
    first, second = [1.0, 0.4, 0.0, 1.0], [0.2, 0.4, 0.0, 0.0]
    there, back = (
        bootstrap_difference(first, second, seed=0),
        bootstrap_difference(second, first, seed=1),
    )
    assert there.value == pytest.approx(0.45)
    assert back.value == pytest.approx(-0.45)
    assert (back.low, back.high) == (
        pytest.approx(-there.high, abs=0.02),
        pytest.approx(-there.low, abs=0.02),
    )


@given(st.lists(LETTERS, min_size=1, max_size=200))
def test_position_bias_is_pearsons_chi_square_test(letters):
    found = position_bias(letters, [["A", "B", "C"]] * len(letters))
    counts = [letters.count(letter) for letter in "ABC"]
    if not sum(counts):
        assert found.shares == {}
        assert found.p_value is None
        return
    theirs = stats.chisquare(counts)
    assert (found.statistic, found.p_value) == (
        pytest.approx(theirs.statistic, abs=1e-9),
        pytest.approx(theirs.pvalue, abs=1e-9),
    )
    assert list(found.shares.values()) == pytest.approx(np.array(counts) / sum(counts))


def test_position_bias_expects_letters_as_often_as_offered():
    found = position_bias(
        ["A", "B", "A", "D"], [["A", "B"], ["A", "B"], ["A", "B", "C", "D"], ["A", "B", "C", "D"]]
    )
    assert found.expected == pytest.approx({"A": 1.5 / 4, "B": 1.5 / 4, "C": 0.5 / 4, "D": 0.5 / 4})
    assert found.shares == {"A": 0.5, "B": 0.25, "C": 0, "D": 0.25}
    assert found.statistic == pytest.approx(0.25 / 1.5 + 0.25 / 1.5 + 0.25 / 0.5 + 0.25 / 0.5)
    with pytest.raises(ValueError, match="'C' is not among A, B"):
        position_bias(["C"], [["A", "B"]])


def test_agreement_rate_is_the_share_of_agreeing_pairs():
    assert agreement_rate([["A", "A", "B"]]) == pytest.approx(1 / 3)
    assert agreement_rate([["A", "A"], [None, None]]) == 0.5
    with pytest.raises(ValueError, match="two runs"):
        agreement_rate([["A"]])


def test_length_statistics_by_hand():
    found = length_statistics([10, 20, 30, 100], [False, False, False, True])
    expected = (40, 25, pytest.approx(30 + 0.85 * 70), 100, 0.25)
    assert dataclasses.astuple(found) == expected
    with pytest.raises(ValueError, match="as many lengths as flags"):
        length_statistics([1], [])


@pytest.mark.parametrize("right", [[], [[]], [[True], [True, False]]])
def test_accuracy_interval_refuses_empty_or_ragged_runs(right):
    with pytest.raises(ValueError, match="the same number of runs"):
        accuracy_interval(right)


def test_paired_tests_refuse_unequal_or_empty_items():
    with pytest.raises(ValueError, match="shorter|longer"):
        mcnemar([True], [True, False])
    with pytest.raises(ValueError, match="at least one item"):
        bootstrap_difference([], [], seed=0)
