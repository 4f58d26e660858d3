"""Compares a result with its reference and says where and by how much they differ."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def relative_error(actual: NDArray, expected: NDArray) -> float:
    """|actual - expected| / |expected|, both in the Euclidean norm over all elements."""
    norm = float(np.linalg.norm(expected))
    difference = float(np.linalg.norm(np.asarray(actual, np.float64) - expected))
    return difference / norm if norm > 0 else difference


def _describe(actual: NDArray, expected: NDArray, wrong: NDArray[np.bool_]) -> str:
    places = np.argwhere(wrong)
    shown = [
        f"{tuple(int(i) for i in p)}: got {actual[tuple(p)]!r}, expected {expected[tuple(p)]!r}" for p in places[:4]
    ]
    return f"{len(places)} of {wrong.size} elements, first at " + "; ".join(shown)


def assert_same_special_values(actual: NDArray, expected: NDArray, what: str) -> None:
    """NaN and infinities must stand in the same places, with the same sign."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    for name, kind in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        wrong = kind(actual) != kind(expected)
        assert not wrong.any(), f"{what}: {name} in the wrong place, {_describe(actual, expected, wrong)}"


def share_of_rounding(expected: NDArray[np.float64]) -> float:
    """What independent roundings, each uniform up to its limit, add up to: 1/sqrt(3) of the limit for many elements,
    with five standard deviations of room, which a few large elements widen to the limit itself."""
    squares = expected**2
    num_elements_that_count = squares.sum() ** 2 / max((squares**2).sum(), np.finfo(np.float64).tiny)
    variance = 4 / 45  # of the square of a number that is uniform in [-1, 1]
    return min(1.0, (1 / 3 + 5 * (variance / max(num_elements_that_count, 1.0)) ** 0.5) ** 0.5)


def assert_close(
    actual: NDArray, expected: NDArray, *, relative: float, rounding: float = 0.0, what: str = "out"
) -> None:
    """Bounds the relative error of the whole tensor by `relative`, and the error of every element by ten times that of
    the expected root mean square, which no wrong row survives. `rounding` is the unit roundoff of the output's dtype
    (2^-11 for float16): what storing an exact result may add to each element, and `share_of_rounding` to the whole."""
    assert_same_special_values(actual, expected, what)
    finite = np.isfinite(expected)
    if not finite.any():
        return
    actual64 = np.where(finite, actual, 0).astype(np.float64)
    expected64 = np.where(finite, expected, 0).astype(np.float64)
    rms = float(np.sqrt(np.mean(expected64[finite] ** 2)))
    error = np.abs(actual64 - expected64)
    bound = 10 * relative * rms + rounding * np.abs(expected64)
    wrong = error > bound
    assert not wrong.any(), (
        f"{what}: largest error {error.max():.3e} exceeds {bound[wrong].min():.3e}, "
        f"{_describe(actual64, expected64, wrong)}"
    )
    total, allowed = relative_error(actual64, expected64), relative + rounding * share_of_rounding(expected64)
    assert total <= allowed, f"{what}: relative error {total:.3e} exceeds {allowed:.3e}, largest {error.max():.3e}"


def assert_close_absolute(actual: NDArray, expected: NDArray, *, tolerance: float, what: str) -> None:
    """Every finite element within `tolerance`: an absolute error of a log-sum-exp is a relative one of the result."""
    assert_same_special_values(actual, expected, what)
    finite = np.isfinite(expected)
    error = np.abs(np.where(finite, actual, 0).astype(np.float64) - np.where(finite, expected, 0))
    wrong = error > tolerance
    assert not wrong.any(), f"{what}: error above {tolerance:.3e}, {_describe(np.asarray(actual), expected, wrong)}"


def assert_same_bits(actual: NDArray, expected: NDArray, what: str) -> None:
    """Equal shape, dtype and bytes: NaN equals the same NaN, -0 differs from 0."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    unsigned = np.dtype(f"u{actual.dtype.itemsize}")
    a, b = np.ascontiguousarray(actual).view(unsigned), np.ascontiguousarray(expected).view(unsigned)
    wrong = a != b
    assert not wrong.any(), f"{what}: bits differ, {_describe(a, b, wrong)}"
