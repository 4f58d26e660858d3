"""What a model here asks of the attention that it is given."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Attend(Protocol):
    """attend(layer, q [B, n, Hq, D], k [B, n, Hkv, D], v) -> [B, n, Hq, D]; k and v are the new tokens' only.

    Position embedding is applied, or it is ALiBi and `alibi_slopes` [Hq] come along.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, /, **options: Tensor) -> Tensor: ...


def causal_attention(_layer: int, q: Tensor, k: Tensor, v: Tensor, /, *, alibi_slopes: Tensor | None = None) -> Tensor:
    """Attention of a whole sequence over itself, nothing cached."""
    bias = None if alibi_slopes is None else alibi_bias(alibi_slopes, q.shape[1]).to(q.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]  # torch has fewer kernels where grouping is allowed
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=is_grouped)
    return out.transpose(1, 2)


def alibi_bias(slopes: Tensor, length: int) -> Tensor:
    """What ALiBi adds to the scores of a whole sequence, -inf for later keys: float32 [1, Hq, length, length].

    >>> alibi_bias(torch.tensor([0.5]), 2)
    tensor([[[[ 0.0000,    -inf],
              [-0.5000,  0.0000]]]])
    """
    positions = torch.arange(length, device=slopes.device)
    distances = (positions[:, None] - positions).float()
    bias = -slopes[:, None, None] * distances
    return bias.masked_fill(distances < 0, float("-inf"))[None]
