"""Attention of the newest tokens over a quantised KV cache."""

from typing import Literal, overload

import torch
from torch import Tensor

from pyquantattn import _core, ops
from pyquantattn.inference_only import refuse_gradients
from pyquantattn.kv_cache import KVCache
from pyquantattn.outputs import make_outputs


@overload
def decode_attention(
    q: Tensor,
    cache: KVCache,
    *,
    seq_lens: Tensor,
    page_table: Tensor | None = ...,
    seq_starts: Tensor | None = ...,
    sm_scale: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    sliding_window: int | None = ...,
    logits_soft_cap: float | None = ...,
    sinks: Tensor | None = ...,
    num_splits: int | None = ...,
    batch_invariant: bool = ...,
    out: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def decode_attention(
    q: Tensor,
    cache: KVCache,
    *,
    seq_lens: Tensor,
    page_table: Tensor | None = ...,
    seq_starts: Tensor | None = ...,
    sm_scale: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    sliding_window: int | None = ...,
    logits_soft_cap: float | None = ...,
    sinks: Tensor | None = ...,
    num_splits: int | None = ...,
    batch_invariant: bool = ...,
    out: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def decode_attention(
    q: Tensor,
    cache: KVCache,
    *,
    seq_lens: Tensor,
    page_table: Tensor | None = None,
    seq_starts: Tensor | None = None,
    sm_scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: Tensor | None = None,
    num_splits: int | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest query tokens of each sequence over the cache: exact softmax over the stored K and V.

    Shapes: B sequences, n query tokens each (1 to 16), Hq query heads, H = ``cache.num_kv_heads`` with Hq a multiple
    of H, D = ``cache.head_dim``. Query token i of a sequence of length L stands at position p = L - n + i and sees
    key j where ``seq_starts[b] <= j <= p``. All tensors are on the cache's device. Nothing is read on the host with a
    CUDA cache, so that a call can be captured in a CUDA graph; replays then read the tensors' contents of the moment.
    Different graphs and eager calls may run at the same time, since each capture has scratch memory of its own.

    Args:
        q: ``[B, Hq, D]`` (n = 1) or ``[B, n, Hq, D]``, float32, float16 or bfloat16, D contiguous.
        cache: holds the n new tokens already.
        seq_lens: int32 ``[B]``, tokens of each sequence, the n new ones included; 0 allowed.
        page_table: int32 ``[B, max_pages]`` of page ids; None: sequence b owns page b.
        seq_starts: int32 ``[B]``, first visible key (left padding); None: 0.
        sm_scale: multiplies q.k; None: 1 / sqrt(D).
        alibi_slopes: float32 ``[Hq]`` or ``[B, Hq]``; slope * (j - p) joins the score (Press et al.,
            arXiv:2108.12409).
        sliding_window: keys that a query token sees, itself included; None: all.
        logits_soft_cap: scores become cap * tanh(score / cap), before ALiBi; None: no cap.
        sinks: float32 ``[Hq]``, a logit for each head that joins the denominator (Xiao et al., arXiv:2309.17453).
        num_splits: parts that the KV axis is cut into; None: chosen.
        batch_invariant: a row's bits do not depend on the rest of the batch, on page placement, or on the longest
            sequence.
        out: written and returned, of q's shape and dtype, sharing no memory with an input; None: a new tensor.
        return_lse: also return the log-sum-exp.

    Returns:
        The output, of q's shape and dtype; with ``return_lse`` also the natural-log log-sum-exp, float32 of q's shape
        without D, sinks included. A row that sees no key is 0, with log-sum-exp -inf (with a sink: the sink).

    Raises:
        ValueError: an argument breaks one of these rules. On a CPU that includes lengths and page ids out of range.
        UnsupportedError: this build or machine has no kernel for the format, head_dim or device.

    The algorithm is the online softmax of Milakov & Gimelshein (arXiv:1805.02867), with the KV axis split.

    >>> cache = KVCache.allocate(num_pages=2, page_size=16, num_kv_heads=1, head_dim=64)
    >>> cache.append(torch.ones(1, 1, 64), torch.ones(1, 1, 64), torch.tensor([16]))
    >>> table = torch.tensor([[1]], dtype=torch.int32)
    >>> lens = torch.tensor([1], dtype=torch.int32)
    >>> out = decode_attention(torch.ones(1, 4, 64), cache, seq_lens=lens, page_table=table)
    >>> torch.allclose(out, torch.ones(1, 4, 64), atol=1e-2)
    True
    """
    if not isinstance(cache, KVCache):
        raise ValueError(f"decode_attention: cache must be a KVCache, got {type(cache).__name__}")
    if alibi_slopes is not None or sinks is not None:
        refuse_gradients("decode_attention", alibi_slopes=alibi_slopes, sinks=sinks)
    out, lse = make_outputs("decode_attention", q, out, return_lse)
    # fmt: off
    if torch.compiler.is_compiling():
        ops.decode_attention(
            q, cache.k, cache.v, cache.k_scale, cache.v_scale, cache.layout, cache.k_offset, out, lse, seq_lens,
            page_table, seq_starts, sm_scale, alibi_slopes, sliding_window, logits_soft_cap, sinks, num_splits,
            batch_invariant,
        )
    else:
        _core.decode_attention(
            cache._handle, q, out, lse, seq_lens, page_table, seq_starts, sm_scale, alibi_slopes, sliding_window,
            logits_soft_cap, sinks, num_splits, batch_invariant,
        )
    # fmt: on
    return out if lse is None else (out, lse)
