import copy
import pickle
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verippo.core.number_array import NumberArray, number_array


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_reads_like_the_list(ids):
    numbers = number_array(ids, np.int32)
    assert isinstance(numbers, NumberArray)
    assert numbers == ids
    assert list(numbers) == ids
    assert len(numbers) == len(ids)
    assert bool(numbers) == bool(ids)
    assert numbers[1:] == ids[1:]
    assert [9] + numbers + [8] == [9, *ids, 8]
    assert all(type(number) is int for number in numbers)
    assert repr(numbers) == repr(ids)
    assert pickle.loads(pickle.dumps(numbers)) == copy.deepcopy(numbers) == ids


def test_elements_are_pythons_own_numbers():
    assert number_array([-0.1, -2], np.float64)[0] == -0.1
    assert number_array([True, False], np.bool_)[0] is True
    numbers = number_array((5, 6, 7), np.int32)
    assert (numbers[-1], 6 in numbers, numbers.index(7), sum(numbers)) == (7, True, 2, 18)
    with pytest.raises(IndexError):
        numbers[3]


def test_other_numbers_or_another_length_are_not_equal():
    numbers = number_array([1, 2], np.int32)
    assert numbers != [1, 3]
    assert numbers != [1, 2, 3]
    assert numbers != "12"
    assert numbers == np.array([1, 2])


@pytest.mark.parametrize("values", [array("i", [3, 4]), np.array([3, 4]), [3, np.int64(4)]])
def test_arrays_are_copied_and_converted(values):
    numbers = number_array(values, np.int32)
    values[0] = 9
    assert numbers == [3, 4]
    assert np.asarray(numbers).dtype == np.int32
    assert np.asarray(numbers) is numbers.array
    assert np.asarray(numbers, dtype=np.int64).dtype == np.int64


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.5], np.int32),
        ([2**31], np.int32),
        ([10**30], np.int32),
        (["a"], np.int32),
        ([[1], [2, 3]], np.int32),
        (np.zeros((1, 1), int), np.int32),
        ([None], np.float64),
        ([True, 1], np.bool_),
        ("ab", np.int32),
        (None, np.bool_),
    ],
)
def test_what_does_not_fit_is_left_for_a_check_to_refuse(values, dtype):
    assert number_array(values, dtype) is values
