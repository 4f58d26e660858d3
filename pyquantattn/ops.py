"""The operations as torch operators, for torch.compile and torch.export.

Eager calls of the public functions go straight to the extension, which costs a few microseconds; inside a compiled
function the same public functions call these operators, which the compiler sees as opaque and whose writes their
schemas declare. Outputs are allocated by the caller and written in place, so that nothing is copied.
"""

from typing import Any

import torch
from torch import Tensor

from pyquantattn import _core

_CACHE = "Tensor{0} cache_k, Tensor{1} cache_v, Tensor{2}? k_scale, Tensor{3}? v_scale, str layout, Tensor? k_offset"
_SCHEMAS = (
    # Static scales are not written; the schema cannot tell them from dynamic ones.
    f"append_kv({_CACHE.format('(a!)', '(b!)', '(c!)', '(d!)')}, Tensor k, Tensor v, Tensor slot_mapping) -> ()",
    f"decode_attention(Tensor q, {_CACHE.format('', '', '', '')}, Tensor(a!) out, Tensor(b!)? lse, Tensor seq_lens, "
    "Tensor? page_table, Tensor? seq_starts, float? sm_scale, Tensor? alibi_slopes, int? sliding_window, "
    "float? logits_soft_cap, Tensor? sinks, int? num_splits, bool batch_invariant) -> ()",
    "prefill_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!)? lse, Tensor cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? seq_starts, bool causal, float? sm_scale, Tensor? alibi_slopes, "
    "int? sliding_window, float? logits_soft_cap, Tensor? sinks) -> ()",
    f"hybrid_attention(Tensor q, {_CACHE.format('', '', '', '')}, Tensor(a!) out, Tensor(b!)? lse, "
    "Tensor cu_seqlens_q, Tensor seq_lens, Tensor? page_table, Tensor? seq_starts, bool causal, float? sm_scale, "
    "Tensor? alibi_slopes, int? sliding_window, float? logits_soft_cap, Tensor? sinks, int? num_splits, "
    "bool batch_invariant) -> ()",
    "quantize_kv(Tensor x, Tensor(a!) codes, Tensor(b!)? scale, Tensor? offset) -> ()",
    "dequantize_kv(Tensor codes, Tensor? scale, Tensor? offset, Tensor(a!) values) -> ()",
    "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, Tensor(a!) out, Tensor(b!) lse) -> ()",
)


def _append_kv(
    cache_k: Tensor,
    cache_v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    layout: str,
    k_offset: Tensor | None,
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
) -> None:
    handle = _core.CacheHandle(cache_k, cache_v, k_scale, v_scale, layout, k_offset)
    _core.append_kv(handle, k, v, slot_mapping)


def _decode_attention(
    q: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    layout: str,
    k_offset: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    seq_lens: Tensor,
    page_table: Tensor | None,
    seq_starts: Tensor | None,
    sm_scale: float | None,
    alibi_slopes: Tensor | None,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    sinks: Tensor | None,
    num_splits: int | None,
    batch_invariant: bool,
) -> None:
    handle = _core.CacheHandle(cache_k, cache_v, k_scale, v_scale, layout, k_offset)
    # fmt: off
    _core.decode_attention(
        handle, q, out, lse, seq_lens, page_table, seq_starts, sm_scale, alibi_slopes, sliding_window,
        logits_soft_cap, sinks, num_splits, batch_invariant,
    )
    # fmt: on


def _prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seq_starts: Tensor | None,
    causal: bool,
    sm_scale: float | None,
    alibi_slopes: Tensor | None,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    sinks: Tensor | None,
) -> None:
    # fmt: off
    _core.prefill_attention(
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seq_starts, causal, sm_scale, alibi_slopes, sliding_window,
        logits_soft_cap, sinks,
    )
    # fmt: on


def _hybrid_attention(
    q: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    layout: str,
    k_offset: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None,
    seq_starts: Tensor | None,
    causal: bool,
    sm_scale: float | None,
    alibi_slopes: Tensor | None,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    sinks: Tensor | None,
    num_splits: int | None,
    batch_invariant: bool,
) -> None:
    handle = _core.CacheHandle(cache_k, cache_v, k_scale, v_scale, layout, k_offset)
    # fmt: off
    _core.hybrid_attention(
        handle, q, out, lse, cu_seqlens_q, seq_lens, page_table, seq_starts, causal, sm_scale, alibi_slopes,
        sliding_window, logits_soft_cap, sinks, num_splits, batch_invariant,
    )
    # fmt: on


def _quantize_kv(x: Tensor, codes: Tensor, scale: Tensor | None, offset: Tensor | None) -> None:
    _core.quantize_kv(x, codes, scale, offset)


def _dequantize_kv(codes: Tensor, scale: Tensor | None, offset: Tensor | None, values: Tensor) -> None:
    _core.dequantize_kv(codes, scale, offset, values)


def _merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    _core.merge_states(out_a, lse_a, out_b, lse_b, out, lse)


def _fake(*_: Any) -> None:
    """Shapes of the results: none, since every operator writes into its arguments."""


def _register() -> torch.library.Library:
    library = torch.library.Library("pyquantattn", "DEF")
    kernels = (
        _append_kv,
        _decode_attention,
        _prefill_attention,
        _hybrid_attention,
        _quantize_kv,
        _dequantize_kv,
        _merge_states,
    )
    for schema, kernel in zip(_SCHEMAS, kernels, strict=True):
        name = schema.partition("(")[0]
        library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
        for device in ("CPU", "CUDA"):
            library.impl(name, kernel, device)
        torch.library.register_fake(f"pyquantattn::{name}", _fake, lib=library)
    return library


_library = _register()  # the operators live as long as this object

append_kv = torch.ops.pyquantattn.append_kv.default
decode_attention = torch.ops.pyquantattn.decode_attention.default
prefill_attention = torch.ops.pyquantattn.prefill_attention.default
hybrid_attention = torch.ops.pyquantattn.hybrid_attention.default
quantize_kv = torch.ops.pyquantattn.quantize_kv.default
dequantize_kv = torch.ops.pyquantattn.dequantize_kv.default
merge_states = torch.ops.pyquantattn.merge_states.default
