"""Attention over K and V that are numbers: an exact prefill, and whatever the kernels cannot read in place."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Query rows whose scores are in memory at once.
_ROWS_PER_STEP = 256


class Scoring(NamedTuple):
    """How q.k becomes weights: all of a call but query, key, value and mask. The kernels' names for these differ.

    Attributes:
        scaling: multiplies q.k; None: 1 / sqrt(D).
        softcap: scores become cap * tanh(score / cap); None: no cap.
        sinks: ``[Hq]``, logits that join the denominator; None: none.
        alibi_slopes: ``[Hq]``; None: no ALiBi.
        position_bias: added to the scores, broadcast to ``[B, Hq, n, size]``; None: none.
        is_causal: a query token sees no later key, where there is no mask to say so.
        dropout: probability.
    """

    scaling: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    position_bias: Tensor | None = None
    is_causal: bool = True
    dropout: float = 0.0

    @property
    def has_sdpa(self) -> bool:
        """Whether torch's scaled dot product attention can express it."""
        return self.softcap is None and self.sinks is None and self.alibi_slopes is None and self.position_bias is None


def dense_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring
) -> Tensor:
    """Attention of ``[B, Hq, n, D]`` queries over ``[B, H, size, D]`` keys; returns ``[B, n, Hq, D]``.

    torch's scaled dot product attention where it can express the call, else scores formed a few rows at a time.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    if mask is not None and mask.shape[-1] > num_keys:
        mask = mask[..., :num_keys]  # fresh keys of a static cache: the columns behind them are empty slots
    if mask is None and scoring.is_causal and num_queries > 1 and not (scoring.has_sdpa and num_keys == num_queries):
        mask = _causal_mask(num_queries, num_keys, query.device)
    if scoring.has_sdpa:
        attended: Tensor = sdpa_attention_forward(
            module, query, key, value, mask,
            dropout=scoring.dropout, scaling=scoring.scaling, is_causal=scoring.is_causal,
        )[0]  # fmt: skip
        return attended
    out = torch.empty_like(query)
    for begin in range(0, num_queries, _ROWS_PER_STEP):
        rows = slice(begin, min(begin + _ROWS_PER_STEP, num_queries))
        bias = _bias(mask, scoring, rows, query, num_keys)
        out[:, :, rows] = _attend(query[:, :, rows], key, value, bias, scoring)
    return out.transpose(1, 2).contiguous()


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scoring: Scoring) -> Tensor:
    """Softmax in float32 over scores of ``[B, Hq, rows, D]``; ``bias`` is added after the soft cap."""
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    group = num_heads // num_kv_heads
    grouped = query.unflatten(1, (num_kv_heads, group)).flatten(2, 3)
    scale = query.shape[-1] ** -0.5 if scoring.scaling is None else scoring.scaling
    scores = (grouped @ key.transpose(-1, -2)).float() * scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores.unflatten(2, (group, -1)).flatten(1, 2)  # [B, Hq, rows, size]
    if bias is not None:
        scores = scores + bias
    if scoring.sinks is not None:
        sink = scoring.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    # A query that sees no key, as padding does, would get NaN; its output is unused, but NaN would spread.
    weights = torch.nan_to_num(torch.softmax(scores, dim=-1))[..., : key.shape[2]]
    weights = nn.functional.dropout(weights, p=scoring.dropout, training=scoring.dropout > 0).to(value.dtype)
    grouped_weights = weights.unflatten(1, (num_kv_heads, group)).flatten(2, 3)
    attended: Tensor = (grouped_weights @ value).unflatten(2, (group, -1)).flatten(1, 2)
    return attended


def _bias(mask: Tensor | None, scoring: Scoring, rows: slice, query: Tensor, num_keys: int) -> Tensor | None:
    """Mask, position bias and ALiBi of some query rows as one float32 bias; None where there is none."""
    bias = None
    if scoring.alibi_slopes is not None:
        queries = _query_positions(query.shape[2], num_keys, query.device)[rows]
        distances = torch.arange(num_keys, device=query.device) - queries
        bias = scoring.alibi_slopes.float().reshape(-1, query.shape[1], 1, 1) * distances
    for added in (scoring.position_bias, mask):
        if added is None:
            continue
        part = added if added.shape[-2] == 1 else added[..., rows, :]
        if part.dtype == torch.bool:
            part = torch.zeros(part.shape, device=part.device).masked_fill(~part, float("-inf"))
        bias = part.float() if bias is None else bias + part
    return bias


def _query_positions(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """``[n, 1]``: the last query stands at the last key."""
    return torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]


def _causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    keys = torch.arange(num_keys, device=device)
    return (keys <= _query_positions(num_queries, num_keys, device))[None, None]
