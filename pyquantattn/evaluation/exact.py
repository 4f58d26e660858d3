"""Attention from its definition (docs/semantics.md), in torch, with nothing of the library: the yardstick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

CHUNK_SCORES = 1 << 24  # scores that exist at once, so that a long text fits in memory


class AttentionOptions(TypedDict, total=False):
    """What a model asks of its attention beside q, k and v; the keywords of decode_attention."""

    sm_scale: float | None
    sliding_window: int | None
    logits_soft_cap: float | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None


@dataclass(frozen=True)
class ExactAttention:
    """out [n, Hq, D], lse [n, Hq], probabilities [n, Hq, L] (a sink's share is missing from their sum)."""

    out: Tensor
    lse: Tensor
    weights: Tensor


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, first_position: int, options: AttentionOptions, dtype: torch.dtype = torch.float64
) -> ExactAttention:
    """Causal attention of q [n, Hq, D], at first_position and after, over k, v [L, Hkv, D] at 0 .. L-1."""
    group = q.shape[1] // k.shape[1]
    positions = torch.arange(first_position, first_position + len(q), device=q.device)[:, None]
    distance = positions - torch.arange(len(k), device=q.device)  # [n, L]
    visible = distance >= 0
    if (window := options.get("sliding_window")) is not None:
        visible &= distance < window
    scale = options.get("sm_scale")
    queries = q.to(dtype).unflatten(1, (k.shape[1], group)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.einsum("nhgd,lhd->nhgl", queries, k.to(dtype)).flatten(1, 2)
    if (cap := options.get("logits_soft_cap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    if (slopes := options.get("alibi_slopes")) is not None:
        scores = scores - slopes.to(dtype)[:, None] * distance[:, None]
    scores = scores.masked_fill(~visible[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    if (sinks := options.get("sinks")) is not None:
        lse = torch.logaddexp(lse, sinks.to(dtype).expand_as(lse))
    weights = (scores - lse[..., None]).exp()
    out = torch.einsum("nhgl,lhd->nhgd", weights.unflatten(1, (k.shape[1], group)), v.to(dtype)).flatten(1, 2)
    return ExactAttention(out, lse, weights)


def full_text_attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
    """Output [n, Hq, D] of a whole text over itself, in float32, some queries at a time."""
    rows = max(1, CHUNK_SCORES // (q.shape[1] * len(k)))
    parts = [
        exact_attention(
            q[first : first + rows], k[: first + rows], v[: first + rows], first, options, torch.float32
        ).out
        for first in range(0, len(q), rows)
    ]
    return torch.cat(parts).to(q.dtype)
