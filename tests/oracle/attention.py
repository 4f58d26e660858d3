"""Attention by definition, one query row at a time, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def get_alibi_slopes(num_heads: int) -> Floats:
    """Press et al.: a geometric sequence for powers of two; else that of the lower power and odd ones of the next."""

    def of_power_of_two(n: int) -> list[float]:
        first = 2.0 ** (-8.0 / n)
        return [first ** (i + 1) for i in range(n)]

    lower = 2 ** int(np.floor(np.log2(num_heads)))
    slopes = of_power_of_two(lower) + of_power_of_two(2 * lower)[0::2]
    return np.array(slopes[:num_heads])


def attend_row(
    q: Floats,
    k: Floats,
    v: Floats,
    position: int,
    first_key: int,
    *,
    causal: bool,
    sm_scale: float,
    slope: float,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    sink: float | None,
) -> tuple[Floats, float]:
    """One query row at `position` over the keys k[0..L), v[0..L). Returns (out [D], lse)."""
    keys = np.arange(first_key, min(len(k), position + 1) if causal else len(k))
    if sliding_window is not None:
        keys = keys[position - keys < sliding_window]
    scores = sm_scale * (k[keys] @ q)
    if logits_soft_cap is not None:
        scores = logits_soft_cap * np.tanh(scores / logits_soft_cap)
    scores = scores + slope * (keys - position)
    in_denominator = scores if sink is None else np.append(scores, sink)
    if len(in_denominator) == 0:
        return np.zeros(v.shape[1]), -np.inf
    largest = in_denominator.max()
    lse = largest + np.log(np.exp(in_denominator - largest).sum())
    return np.exp(scores - lse) @ v[keys], float(lse)


def attend_sequence(
    q: Floats,
    k: Floats,
    v: Floats,
    *,
    first_key: int = 0,
    slopes: Floats,
    causal: bool = True,
    sm_scale: float | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: Floats | None = None,
) -> tuple[Floats, Floats]:
    """The last n positions q [n, Hq, D] of a sequence k, v [L, Hkv, D]. Returns (out [n, Hq, D], lse [n, Hq])."""
    (num_tokens, num_q_heads, head_dim), (length, num_kv_heads, _) = q.shape, k.shape
    group = num_q_heads // num_kv_heads
    out, lse = np.empty(q.shape), np.empty(q.shape[:2])
    for i in range(num_tokens):
        for h in range(num_q_heads):
            out[i, h], lse[i, h] = attend_row(
                q[i, h],
                k[:, h // group],
                v[:, h // group],
                length - num_tokens + i,
                first_key,
                causal=causal,
                sm_scale=head_dim**-0.5 if sm_scale is None else sm_scale,
                slope=slopes[h],
                sliding_window=sliding_window,
                logits_soft_cap=logits_soft_cap,
                sink=None if sinks is None else sinks[h],
            )
    return out, lse


def slopes_of(alibi_slopes: Floats | None, batch_size: int, num_q_heads: int) -> Floats:
    """[B, Hq]: zero without ALiBi."""
    return np.broadcast_to(0.0 if alibi_slopes is None else alibi_slopes, (batch_size, num_q_heads))


def cached_sequence(pages: Floats, sequence: int, length: int, page_table: NDArray[np.integer] | None) -> Floats:
    """Tokens [0, length) of a sequence, [L, Hkv, D], out of pages [N, P, Hkv, D]; pages past the last live one stay
    unread."""
    num_live_pages = -(-length // pages.shape[1])
    owned = [sequence] if page_table is None else [int(page) for page in page_table[sequence, :num_live_pages]]
    return pages[owned].reshape(-1, *pages.shape[2:])[:length]


def decode_attention(
    q: Floats,
    k_pages: Floats,
    v_pages: Floats,
    *,
    seq_lens: NDArray[np.integer],
    page_table: NDArray[np.integer] | None = None,
    seq_starts: NDArray[np.integer] | None = None,
    alibi_slopes: Floats | None = None,
    **scoring: Any,
) -> tuple[Floats, Floats]:
    """q [B, n, Hq, D]; k_pages, v_pages [N, P, Hkv, D] dequantised. Returns (out [B, n, Hq, D], lse [B, n, Hq])."""
    batch_size, num_tokens = q.shape[:2]
    out, lse = hybrid_attention(
        q.reshape(-1, *q.shape[2:]),
        k_pages,
        v_pages,
        cu_seqlens_q=num_tokens * np.arange(batch_size + 1),
        seq_lens=seq_lens,
        page_table=page_table,
        seq_starts=seq_starts,
        alibi_slopes=alibi_slopes,
        **scoring,
    )
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def hybrid_attention(
    q: Floats,
    k_pages: Floats,
    v_pages: Floats,
    *,
    cu_seqlens_q: NDArray[np.integer],
    seq_lens: NDArray[np.integer],
    page_table: NDArray[np.integer] | None = None,
    seq_starts: NDArray[np.integer] | None = None,
    alibi_slopes: Floats | None = None,
    **scoring: Any,
) -> tuple[Floats, Floats]:
    """q [T, Hq, D], sequence after sequence; k_pages, v_pages [N, P, Hkv, D] dequantised. Returns (out [T, Hq, D],
    lse [T, Hq])."""
    slopes = slopes_of(alibi_slopes, len(seq_lens), q.shape[1])
    out, lse = np.empty(q.shape), np.empty(q.shape[:2])
    for b, length in enumerate(seq_lens):
        rows = slice(cu_seqlens_q[b], cu_seqlens_q[b + 1])
        out[rows], lse[rows] = attend_sequence(
            q[rows],
            cached_sequence(k_pages, b, int(length), page_table),
            cached_sequence(v_pages, b, int(length), page_table),
            first_key=0 if seq_starts is None else int(seq_starts[b]),
            slopes=slopes[b],
            **scoring,
        )
    return out, lse


def prefill_attention(
    q: Floats,
    k: Floats,
    v: Floats,
    *,
    cu_seqlens_q: NDArray[np.integer],
    cu_seqlens_k: NDArray[np.integer] | None = None,
    seq_starts: NDArray[np.integer] | None = None,
    alibi_slopes: Floats | None = None,
    **scoring: Any,
) -> tuple[Floats, Floats]:
    """q [T, Hq, D]; k, v [S, Hkv, D], sequence after sequence. Returns (out [T, Hq, D], lse [T, Hq])."""
    ends = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    slopes = slopes_of(alibi_slopes, len(cu_seqlens_q) - 1, q.shape[1])
    out, lse = np.empty(q.shape), np.empty(q.shape[:2])
    for b in range(len(cu_seqlens_q) - 1):
        rows, keys = slice(cu_seqlens_q[b], cu_seqlens_q[b + 1]), slice(ends[b], ends[b + 1])
        first_key = 0 if seq_starts is None else int(seq_starts[b])
        out[rows], lse[rows] = attend_sequence(
            q[rows], k[keys], v[keys], first_key=first_key, slopes=slopes[b], **scoring
        )
    return out, lse


def merge_states(out_a: Floats, lse_a: Floats, out_b: Floats, lse_b: Floats) -> tuple[Floats, Floats]:
    """Joins results over disjoint key sets; a side that saw nothing contributes nothing."""
    lse = np.logaddexp(lse_a, lse_b)
    seen = np.isfinite(lse)
    with np.errstate(invalid="ignore"):
        weight_a = np.where(seen, np.exp(lse_a - lse), 0.0)
        weight_b = np.where(seen, np.exp(lse_b - lse), 0.0)
    return weight_a[..., None] * out_a + weight_b[..., None] * out_b, lse
