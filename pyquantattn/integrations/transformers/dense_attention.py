"""Attention over K and V that are numbers: an exact prefill, and whatever the kernels cannot read in place."""

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Query rows whose scores are in memory at once.
_ROWS_PER_STEP = 256


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    dropout: float,
    is_causal: bool,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    position_bias: Tensor | None,
) -> Tensor:
    """Attention of ``[B, Hq, n, D]`` queries over ``[B, H, size, D]`` keys; returns ``[B, n, Hq, D]``.

    torch's scaled dot product attention where it can express the call, else scores formed a few rows at a time.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    if mask is not None and mask.shape[-1] > num_keys:
        mask = mask[..., :num_keys]  # fresh keys of a static cache: the columns behind them are empty slots
    if mask is None and is_causal and num_queries > 1 and num_keys != num_queries:
        mask = _causal_rows(0, num_queries, num_queries, num_keys, query.device)[None, None]
    has_sdpa = softcap is None and sinks is None and alibi_slopes is None and position_bias is None
    if has_sdpa:
        attended: Tensor = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal
        )[0]
        return attended
    out = torch.empty_like(query)
    for begin in range(0, num_queries, _ROWS_PER_STEP):
        end = min(begin + _ROWS_PER_STEP, num_queries)
        bias = _bias(mask, position_bias, alibi_slopes, is_causal, begin, end, query, key)
        out[:, :, begin:end] = _attend(query[:, :, begin:end], key, value, bias, scaling, softcap, sinks, dropout)
    return out.transpose(1, 2).contiguous()


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Softmax in float32 over scores of ``[B, Hq, rows, D]``; ``bias`` is added after the soft cap."""
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    group = num_heads // num_kv_heads
    grouped = query.unflatten(1, (num_kv_heads, group)).flatten(2, 3)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (grouped @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.unflatten(2, (group, -1)).flatten(1, 2)  # [B, Hq, rows, size]
    if bias is not None:
        scores = scores + bias
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1)
    if sinks is not None:
        weights = weights[..., :-1]
    # A query that sees no key, as padding does, would get NaN; its output is unused, but NaN would spread.
    weights = torch.nan_to_num(weights)
    weights = nn.functional.dropout(weights, p=dropout, training=dropout > 0).to(value.dtype)
    grouped_weights = weights.unflatten(1, (num_kv_heads, group)).flatten(2, 3)
    attended: Tensor = (grouped_weights @ value).unflatten(2, (group, -1)).flatten(1, 2)
    return attended


def _bias(
    mask: Tensor | None,
    position_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    is_causal: bool,
    begin: int,
    end: int,
    query: Tensor,
    key: Tensor,
) -> Tensor | None:
    """Mask, position bias and ALiBi of query rows [begin, end) as one float32 bias; None where there is none."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    bias = None
    if alibi_slopes is not None:
        queries = torch.arange(begin, end, device=query.device) + (num_keys - num_queries)
        distances = torch.arange(num_keys, device=query.device)[None] - queries[:, None]
        bias = alibi_slopes.float().reshape(-1, query.shape[1], 1, 1) * distances
    if position_bias is not None:
        rows = position_bias if position_bias.shape[-2] == 1 else position_bias[..., begin:end, :]
        bias = rows.float() if bias is None else bias + rows
    if mask is None and is_causal and num_queries > 1:
        mask = _causal_rows(0, num_queries, num_queries, num_keys, query.device)[None, None]
    if mask is None:
        return bias
    rows = mask if mask.shape[-2] == 1 else mask[..., begin:end, :]
    if rows.dtype == torch.bool:
        rows = torch.zeros(rows.shape, device=rows.device).masked_fill(~rows, float("-inf"))
    return rows if bias is None else bias + rows


def _causal_rows(begin: int, end: int, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """The last query sees the last key."""
    queries = torch.arange(begin, end, device=device) + (num_keys - num_queries)
    return torch.arange(num_keys, device=device)[None] <= queries[:, None]
