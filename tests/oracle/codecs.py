"""Codecs by definition: a code is the number of a bit pattern, and encoding is a search for the nearest pattern."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class FloatLayout:
    """A binary float: sign, exponent and mantissa fields, and what its highest patterns mean."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    has_infinity: bool  # E4M3 "fn" has none: only its all-ones pattern is NaN

    def magnitudes(self) -> Floats:
        """The value of every pattern without a sign bit, by its position."""
        pattern = np.arange(2 ** (self.exponent_bits + self.mantissa_bits))
        exponent, mantissa = pattern >> self.mantissa_bits, pattern & (2**self.mantissa_bits - 1)
        fraction = mantissa / 2.0**self.mantissa_bits
        subnormal = np.ldexp(fraction, 1 - self.bias)
        normal = np.ldexp(1.0 + fraction, exponent - self.bias)
        value = np.where(exponent == 0, subnormal, normal)
        if self.has_infinity:
            value[exponent == 2**self.exponent_bits - 1] = np.nan
            value[(2**self.exponent_bits - 1) << self.mantissa_bits] = np.inf
        else:
            value[-1] = np.nan
        return value


@dataclass(frozen=True)
class Format:
    """One KV format: `max_code` is the largest code's value where a scale maps the data onto the codes."""

    name: str
    code_dtype: type
    torch_dtype: str
    max_code: float | None = None  # None: 16-bit formats, which have no scale
    layout: FloatLayout | None = None  # None: int8

    @property
    def has_scale(self) -> bool:
        return self.max_code is not None

    @property
    def code_bytes(self) -> int:
        return np.dtype(self.code_dtype).itemsize


FORMATS = {
    row.name: row
    for row in (
        Format("fp16", np.uint16, "float16", layout=FloatLayout(5, 10, 15, True)),
        Format("bf16", np.uint16, "bfloat16", layout=FloatLayout(8, 7, 127, True)),
        Format("int8", np.int8, "int8", max_code=127.0),
        Format("fp8_e4m3", np.uint8, "float8_e4m3fn", max_code=448.0, layout=FloatLayout(4, 3, 7, False)),
        Format("fp8_e5m2", np.uint8, "float8_e5m2", max_code=57344.0, layout=FloatLayout(5, 2, 15, True)),
    )
}


def split_pair(kv_format: str) -> tuple[Format, Format]:
    """The formats of K and of V: "int8" is int8 for both, "fp16/int8" is mixed."""
    k_name, _, v_name = kv_format.partition("/")
    return FORMATS[k_name], FORMATS[v_name or k_name]


@cache
def _tables(layout: FloatLayout) -> tuple[Floats, Floats, Floats]:
    """(value of every pattern, finite magnitudes, midpoints between neighbours)."""
    magnitudes = layout.magnitudes()
    finite = magnitudes[np.isfinite(magnitudes)]
    # Beyond the largest value comes the next step of its binade, which is where rounding to infinity starts.
    beyond = finite[-1] + (finite[-1] - finite[-2])
    midpoints = (finite + np.append(finite[1:], beyond)) / 2
    return np.concatenate([magnitudes, -magnitudes]), finite, midpoints


def decode_float(codes: NDArray[np.integer], layout: FloatLayout) -> Floats:
    return _tables(layout)[0][codes.astype(np.int64)]


def encode_float(x: Floats, layout: FloatLayout, *, saturate: bool) -> NDArray[np.int64]:
    """Nearest pattern, ties to the even one; beyond the largest value: that value, or infinity."""
    _, finite, midpoints = _tables(layout)
    magnitude = np.abs(x)
    index = np.searchsorted(midpoints, magnitude, side="left")
    is_tie = np.isin(magnitude, midpoints) & (index % 2 == 1)
    index = np.where(is_tie, index + 1, index)
    index = np.minimum(index, len(finite) - 1 if saturate else len(finite))
    sign_bit = 1 << (layout.exponent_bits + layout.mantissa_bits)
    pattern = np.where(np.isnan(x), sign_bit - 1, index)
    return np.where(np.signbit(x), pattern | sign_bit, pattern)


def encode(x: Floats, fmt: Format) -> NDArray[np.integer]:
    """Codes of numbers that are already divided by their scale."""
    if fmt.layout is None:
        return np.rint(np.clip(np.nan_to_num(x, nan=0.0), -127, 127)).astype(np.int8)
    return encode_float(x, fmt.layout, saturate=fmt.has_scale).astype(fmt.code_dtype)


def decode(codes: NDArray[np.integer], fmt: Format) -> Floats:
    return codes.astype(np.float64) if fmt.layout is None else decode_float(codes, fmt.layout)


def round_up_to_float16(x: NDArray[np.float32]) -> Floats:
    """The smallest float16 not below x >= 0, at most 65504."""
    half = FORMATS["fp16"].layout
    assert half is not None
    finite = _tables(half)[1]
    return finite[np.minimum(np.searchsorted(finite, x.astype(np.float64), side="left"), len(finite) - 1)]


def dynamic_scale(x: NDArray[np.float32], fmt: Format) -> Floats:
    """One float16 scale for each vector of the last axis: the largest finite magnitude maps onto the largest code."""
    assert fmt.max_code is not None
    amax = np.where(np.isfinite(x), np.abs(x), 0).max(axis=-1, initial=0).astype(np.float32)
    return round_up_to_float16(amax / np.float32(fmt.max_code))


def quantize(
    x: NDArray[np.float32], fmt: Format, scale: NDArray | None = None, offset: NDArray[np.float32] | None = None
) -> tuple[NDArray, Floats | None]:
    """x [..., heads, head_dim] -> (codes, scale). `scale`: None for dynamic, [] or [heads] for static; `offset`
    [heads, head_dim] is subtracted from x first, in one float32 subtraction."""
    if offset is not None:
        with np.errstate(invalid="ignore"):
            x = np.where(np.isnan(x), x, x - offset)
    if not fmt.has_scale:
        return encode(x.astype(np.float64), fmt), None
    if scale is None:
        scale = dynamic_scale(x, fmt)
        divisor = scale
    else:
        divisor = np.broadcast_to(scale, x.shape[:-1])
    with np.errstate(all="ignore"):
        quotient = (x / divisor.astype(np.float32)[..., None]).astype(np.float64)  # one float32 division
    codes = encode(quotient, fmt)
    return np.where(divisor[..., None] > 0, codes, np.zeros_like(codes)), scale


def dequantize(
    codes: NDArray[np.integer], fmt: Format, scale: NDArray | None = None, offset: NDArray[np.float32] | None = None
) -> Floats:
    """codes [..., heads, head_dim]; scale [..., heads], [heads], [] or None; offset [heads, head_dim] or None."""
    values = decode(codes, fmt)
    if scale is not None:
        values = values * np.broadcast_to(scale, values.shape[:-1]).astype(np.float64)[..., None]
    return values if offset is None else values + offset.astype(np.float64)
