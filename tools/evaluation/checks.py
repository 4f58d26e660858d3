"""Sanity bounds of the demo: a report whose controls fail must not be believed, so the demo then exits with 1."""

from __future__ import annotations

import math
from typing import Any

from pyquantattn.formats import KV_PAIRS

from . import attention_error
from .attention_error import AttentionErrors
from .cached_model import Capture, PagedCaches

MAX_KERNEL_ERROR = 1e-3  # float32 query, any format
# Mean codec error that each format may have on this model, worst of K and V: from below too, since an error that is
# too small would mean that the quantised codes were never read.
CODEC_BANDS = {
    "fp16": (1e-4, 6e-4),
    "bf16": (8e-4, 5e-3),
    "int8": (3e-3, 2e-2),
    "fp8_e4m3": (1e-2, 7e-2),
    "fp8_e5m2": (2.5e-2, 1.5e-1),
}
MIN_AGREEMENT_PERCENT = (
    90  # of written tokens with full precision's choice: a cache that lost its keys writes other text
)
NEGATIVE_CONTROL_SCALE = 4.0

Check = dict[str, Any]


def _check(rule: str, got: float | bool, passed: bool) -> Check:
    return {"rule": rule, "got": f"{got:.4g}" if isinstance(got, float) else str(got), "passed": bool(passed)}


def codec_band(kv_format: str) -> tuple[float, float]:
    """Lower and upper bound of the mean codec error of a format or pair."""
    pair = KV_PAIRS[kv_format]
    return max(CODEC_BANDS[pair.k.name], CODEC_BANDS[pair.v.name])


def check_format(record: dict[str, Any]) -> list[Check]:
    """The rules that every format must keep."""
    name, (low, high) = record["kv_format"], codec_band(record["kv_format"])
    pair, error = KV_PAIRS[name], record["codec_error_mean"]
    scale_bits = sum(16 / 128 for row in (pair.k, pair.v) if row.has_scale) / 2  # float16 per vector of 128
    bits = (pair.k.code_bits + pair.v.code_bits) / 2 + scale_bits
    saving = 100 * (1 - bits / 16)
    kernel, saved, worst_kl = record["kernel_error_max"], record["saving_percent"], record["predictions"]["kl_max"]
    agreement, least = record["agreement_percent"], MIN_AGREEMENT_PERCENT
    return [
        _check(f"{name}: kernel error at most {MAX_KERNEL_ERROR:g}", kernel, kernel <= MAX_KERNEL_ERROR),
        _check(f"{name}: mean codec error between {low:g} and {high:g}", error, low <= error <= high),
        _check(f"{name}: saves {saving:.2f} % of fp16's bytes", saved, abs(saved - saving) < 0.01),
        _check(f"{name}: predictions are finite", worst_kl, math.isfinite(worst_kl)),
        _check(f"{name}: written text agrees with full precision by {least} %", agreement, agreement >= least),
    ]


def check_controls(
    capture: Capture,
    caches: PagedCaches,
    lengths: tuple[int, ...],
    original: list[list[list[Any]]],
    errors: AttentionErrors,
) -> list[Check]:
    """int8 again: the same bits twice, and K scales made wrong on purpose must leave the band."""
    again = attention_error.measure(capture, caches, lengths, original)
    is_same = bool((again.kernel == errors.kernel).all())
    for cache in caches.layers:
        cache.k_scale.mul_(NEGATIVE_CONTROL_SCALE)
    wrong = float(attention_error.measure(capture, caches, lengths, original).codec.mean())
    high = codec_band("int8")[1]
    rule = f"negative control: int8 with K scales times {NEGATIVE_CONTROL_SCALE:g} breaks its bound of {high:g}"
    return [
        _check("int8: a second decode of the same bytes gives the same errors", is_same, is_same),
        _check(rule, wrong, wrong > high),
    ]
