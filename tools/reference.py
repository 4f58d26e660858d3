"""Attention in float64 over what a cache really stores: the yardstick of the demo and the benchmark.

It reads codes and scales itself and uses nothing of the library but the cache's tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import pyquantattn as qa


def stored_tokens(cache: qa.KVCache, pages: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first `length` tokens of the sequence that owns `pages` of an NHD cache: float64 [length, Hkv, D]."""
    found = []
    for codes, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        numbers = codes[pages].double()
        if scale is not None:
            numbers *= (scale[pages] if scale.ndim == 3 else scale).double()[..., None]
        found.append(numbers.flatten(0, 1)[:length])
    return found[0], found[1]


def attention_float64(q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output [n, Hq, D] and LSE [n, Hq] of queries q [n, Hq, D] over k, v [L, Hkv, D], causal.

    positions [n]: of the queries among the keys; by default they are the last n tokens' queries. One KV head at a time,
    so that a long cache needs little memory.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    group, length = num_q_heads // k.shape[1], k.shape[0]
    if positions is None:
        positions = torch.arange(length - num_tokens, length, device=q.device)
    hidden = torch.arange(length, device=q.device) > positions[:, None]
    outputs, lses = [], []
    for head in range(k.shape[1]):
        queries = q[:, head * group : (head + 1) * group].double()
        scores = torch.einsum("nhd,ld->nhl", queries, k[:, head].double()) / math.sqrt(head_dim)
        scores.masked_fill_(hidden[:, None], -math.inf)
        lse = scores.logsumexp(-1)
        outputs.append(torch.einsum("nhl,ld->nhd", (scores - lse[..., None]).exp(), v[:, head].double()))
        lses.append(lse)
    return torch.cat(outputs, dim=1), torch.cat(lses, dim=1)
