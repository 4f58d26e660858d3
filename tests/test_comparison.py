"""The comparison helper must fail where results are wrong."""

import numpy as np
import pytest
from comparison import (
    assert_close,
    assert_close_absolute,
    assert_same_bits,
    assert_same_special_values,
    relative_error,
    share_of_rounding,
)

EXPECTED = np.random.default_rng(0).normal(size=(3, 4, 64))


def test_accepts_an_error_inside_the_bound():
    assert_close(EXPECTED * (1 + 9e-4), EXPECTED, relative=1e-3)


@pytest.mark.parametrize("spoil", ["scale", "one_row", "one_element", "nan", "inf", "shape"])
def test_rejects(spoil):
    actual = EXPECTED.copy()
    if spoil == "scale":
        actual *= 1 + 1.1e-3
    elif spoil == "one_row":
        actual[1, 2] = EXPECTED[1, 1]
    elif spoil == "one_element":
        actual[2, 3, 63] += 0.02
    elif spoil == "nan":
        actual[0, 0, 0] = np.nan
    elif spoil == "inf":
        actual[0, 0, 0] = np.inf
    else:
        actual = actual[:2]
    with pytest.raises(AssertionError, match="out:"):
        assert_close(actual, EXPECTED, relative=1e-3)


def test_rounding_of_the_output_is_granted_to_each_element_and_no_more():
    half = EXPECTED.astype(np.float16).astype(np.float64)
    assert_close(half, EXPECTED, relative=1e-9, rounding=2.0**-11)
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(half, EXPECTED, relative=1e-9, rounding=2.0**-12)


def test_roundings_of_few_elements_may_all_be_large():
    """One element may be off by the whole roundoff; of very many, the mean square is a third of its square."""
    assert share_of_rounding(np.array([0.0, 3.0])) == share_of_rounding(np.zeros(3)) == 1
    assert 3**-0.5 < share_of_rounding(EXPECTED) < 0.75
    largest = np.float64(1 + 2.0**-11)  # half way between two float16 numbers
    assert_close(np.float64([1.0]), largest[None], relative=1e-9, rounding=2.0**-11)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(np.ones(EXPECTED.shape), np.full(EXPECTED.shape, largest), relative=1e-9, rounding=2.0**-11)


def test_message_says_where_and_how_much():
    actual = EXPECTED.copy()
    actual[2, 1, 5] += 7
    with pytest.raises(AssertionError, match=r"largest error 7\.000e\+00 .*1 of 768 elements, first at \(2, 1, 5\)"):
        assert_close(actual, EXPECTED, relative=1e-3)


def test_special_values_must_match_in_place_and_sign():
    expected = np.array([0.0, -np.inf, np.inf, np.nan])
    assert_same_special_values(expected, expected, "lse")
    for wrong in ([-np.inf, 0.0, np.inf, np.nan], [0.0, np.inf, np.inf, np.nan], [0.0, -np.inf, np.inf, 0.0]):
        with pytest.raises(AssertionError, match="lse:"):
            assert_same_special_values(np.array(wrong), expected, "lse")


def test_absolute_comparison_rejects_one_element():
    expected = np.array([-np.inf, 3.0, 900.0])
    assert_close_absolute(np.array([-np.inf, 3.0005, 900.0]), expected, tolerance=1e-3, what="lse")
    with pytest.raises(AssertionError, match="1 of 3"):
        assert_close_absolute(np.array([-np.inf, 3.0, 900.002]), expected, tolerance=1e-3, what="lse")


def test_bits_distinguish_zeros_and_dtypes():
    zeros = np.zeros(2, np.float32)
    with pytest.raises(AssertionError, match="bits differ"):
        assert_same_bits(-zeros, zeros, "out")
    with pytest.raises(AssertionError, match="dtype"):
        assert_same_bits(zeros.astype(np.float64), zeros, "out")
    nan = np.full(2, np.nan, np.float32)
    assert_same_bits(nan, nan, "out")


def test_relative_error_of_a_zero_reference_is_the_error_itself():
    assert relative_error(np.array([0.5]), np.array([0.0])) == 0.5
