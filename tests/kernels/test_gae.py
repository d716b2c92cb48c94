import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from verippo.kernels import reference
from verippo.kernels.gae import discounted_suffix_sums


def ragged(lengths, seed, dtype=torch.float64):
    """Random x, and decays in 0..1 with a 0 at the end of each segment."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lengths), generator=generator, dtype=dtype)
    decay = torch.rand(sum(lengths), generator=generator, dtype=dtype)
    decay[torch.tensor(lengths).cumsum(0) - 1] = 0
    return x, decay


def test_three_elements_worked_by_hand():
    # 3;  2 + 1/2 * 3 = 3.5;  1 + 1/2 * 3.5 = 2.75
    y = discounted_suffix_sums(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.5, 0.5]))
    assert y.tolist() == [2.75, 3.5, 3.0]


def test_a_decay_of_zero_ends_a_segment_worked_by_hand():
    # segments (1, 2) and (4, 8, 16), decay 1/2 within each
    x, decay = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([0.5, 0.0, 0.5, 0.5, 0.0])
    assert discounted_suffix_sums(x, decay, max_length=3).tolist() == [2.0, 2.0, 12.0, 16.0, 16.0]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8), seed=st.integers(0, 10**6))
def test_equals_the_loop_in_float64(lengths, seed):
    x, decay = ragged(lengths, seed)
    expected = reference.discounted_suffix_sums(x, decay)
    for max_length in (None, max(lengths), sum(lengths) + 5):
        y = discounted_suffix_sums(x, decay, max_length=max_length)
        assert y.dtype == torch.float64
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rate", [0.5, 0.95, 1.0])
def test_fp32_is_accurate_over_five_thousand_tokens(rate):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    decay = torch.full((5000,), rate)
    expected = reference.discounted_suffix_sums(x.double(), decay.double())
    y = discounted_suffix_sums(x, decay)
    assert y.dtype == torch.float32
    assert float((y - expected).abs().max() / expected.abs().max()) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_segment_does_not_reach_the_one_before(bad):
    x, decay = ragged([5, 4], 0)
    expected = discounted_suffix_sums(x, decay)
    x[7] = bad
    y = discounted_suffix_sums(x, decay)
    assert torch.equal(y[:5], expected[:5])
    assert torch.equal(y[8:], expected[8:])
    assert not y[5:8].isfinite().any()


class CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(n, max_length):
    with CountOperations() as mode:
        discounted_suffix_sums(torch.ones(n), torch.ones(n), max_length=max_length)
    return mode.count


def test_the_number_of_steps_is_logarithmic_in_the_longest_segment():
    for max_length, steps in ((2, 1), (3, 2), (64, 6), (65, 7), (None, 13)):
        assert 12 * steps < operations(8192, max_length) < 20 * steps


def test_inputs_are_left_as_they_were():
    for n in (1, 7):
        x, decay = ragged([n], 3)
        before = x.clone(), decay.clone()
        discounted_suffix_sums(x, decay).add_(1)
        assert torch.equal(x, before[0])
        assert torch.equal(decay, before[1])


def test_no_elements_and_one_element():
    assert discounted_suffix_sums(torch.zeros(0), torch.zeros(0)).shape == (0,)
    assert discounted_suffix_sums(torch.tensor([2.0]), torch.tensor([0.9])).tolist() == [2.0]


@pytest.mark.parametrize(
    ("x", "decay", "max_length", "message"),
    [
        (torch.zeros(3), torch.zeros(2), None, "shapes"),
        (torch.zeros(3, 1), torch.zeros(3, 1), None, "shapes"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.float64), None, "one floating-point dtype"),
        (
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(3, dtype=torch.int64),
            None,
            "one floating-point dtype",
        ),
        (torch.zeros(3), torch.zeros(3), -1, "max_length is -1"),
    ],
)
def test_wrong_arguments_are_refused(x, decay, max_length, message):
    with pytest.raises(ValueError, match=message):
        discounted_suffix_sums(x, decay, max_length=max_length)
