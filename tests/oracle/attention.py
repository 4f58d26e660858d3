"""Attention by definition, one query row at a time, in float64."""

from __future__ import annotations

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
    sm_scale: float,
    slope: float,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    sink: float | None,
) -> tuple[Floats, float]:
    """One query row at `position` over the keys k[0..L), v[0..L). Returns (out [D], lse)."""
    keys = np.arange(first_key, min(len(k), position + 1))
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


def decode_attention(
    q: Floats,
    k_pages: Floats,
    v_pages: Floats,
    *,
    seq_lens: NDArray[np.integer],
    page_table: NDArray[np.integer] | None = None,
    seq_starts: NDArray[np.integer] | None = None,
    sm_scale: float | None = None,
    alibi_slopes: Floats | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: Floats | None = None,
) -> tuple[Floats, Floats]:
    """q [B, n, Hq, D]; k_pages, v_pages [N, P, Hkv, D] dequantised. Returns (out [B, n, Hq, D], lse [B, n, Hq])."""
    batch_size, num_tokens, num_q_heads, head_dim = q.shape
    page_size, num_kv_heads = k_pages.shape[1:3]
    group = num_q_heads // num_kv_heads
    slopes = np.zeros((batch_size, num_q_heads)) if alibi_slopes is None else alibi_slopes
    slopes = np.broadcast_to(slopes, (batch_size, num_q_heads))
    out, lse = np.empty(q.shape), np.empty(q.shape[:3])
    for b in range(batch_size):
        length = int(seq_lens[b])
        num_live_pages = -(-length // page_size)
        pages = [b] if page_table is None else [int(page) for page in page_table[b, :num_live_pages]]
        k = k_pages[pages].reshape(-1, num_kv_heads, head_dim)[:length]
        v = v_pages[pages].reshape(-1, num_kv_heads, head_dim)[:length]
        first_key = 0 if seq_starts is None else int(seq_starts[b])
        for i in range(num_tokens):
            for h in range(num_q_heads):
                out[b, i, h], lse[b, i, h] = attend_row(
                    q[b, i, h],
                    k[:, h // group],
                    v[:, h // group],
                    length - num_tokens + i,
                    first_key,
                    sm_scale=head_dim**-0.5 if sm_scale is None else sm_scale,
                    slope=slopes[b, h],
                    sliding_window=sliding_window,
                    logits_soft_cap=logits_soft_cap,
                    sink=None if sinks is None else sinks[h],
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
