"""Attention of a batch that prefills and decodes at once, over a quantised KV cache."""

from typing import Literal, overload

import torch
from torch import Tensor

from pyquantattn import _core, ops
from pyquantattn.inference_only import refuse_gradients
from pyquantattn.kv_cache import KVCache
from pyquantattn.outputs import make_outputs


@overload
def hybrid_attention(
    q: Tensor,
    cache: KVCache,
    *,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None = ...,
    seq_starts: Tensor | None = ...,
    causal: bool = ...,
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
def hybrid_attention(
    q: Tensor,
    cache: KVCache,
    *,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None = ...,
    seq_starts: Tensor | None = ...,
    causal: bool = ...,
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
def hybrid_attention(
    q: Tensor,
    cache: KVCache,
    *,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    page_table: Tensor | None = None,
    seq_starts: Tensor | None = None,
    causal: bool = True,
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
    """Attention of one ragged batch over the cache: sequences with no, one, few or many query tokens, in any order.

    Some sequences may decode while others prefill, a prompt may come whole or in chunks, and a chunk may follow a
    prefix that the cache held before: append K and V of the new tokens, then call. Each sequence is computed by the
    kernel that suits it, directly over the stored codes.

    Shapes: B sequences, T query tokens of all of them together, laid one after another, Hq query heads,
    H = ``cache.num_kv_heads`` with Hq a multiple of H, D = ``cache.head_dim``. Query token i of the n query tokens of a
    sequence of length L stands at position p = L - n + i and sees key j where ``seq_starts[b] <= j < L`` and, with
    ``causal``, ``j <= p``. All tensors are on the cache's device.

    Args:
        q: ``[T, Hq, D]``, float32, float16 or bfloat16, D contiguous.
        cache: holds the new tokens already.
        cu_seqlens_q: int32 ``[B + 1]``, the first query token of each sequence, then T: 0 first, never decreasing.
        seq_lens: int32 ``[B]``, tokens of each sequence in the cache, the query tokens included; 0 allowed.
        page_table: int32 ``[B, max_pages]`` of page ids; None: sequence b owns page b.
        seq_starts: int32 ``[B]``, first visible key (left padding); None: 0.
        causal: a query token sees no key behind its position; False: it sees all keys.
        sm_scale: multiplies q.k; None: 1 / sqrt(D).
        alibi_slopes: float32 ``[Hq]`` or ``[B, Hq]``; slope * (j - p) joins the score (Press et al.,
            arXiv:2108.12409), also where j > p.
        sliding_window: keys that a query token sees up to its position, itself included; None: all. Without
            ``causal`` it bounds the past alone.
        logits_soft_cap: scores become cap * tanh(score / cap), before ALiBi; None: no cap.
        sinks: float32 ``[Hq]``, a logit for each head that joins the denominator (Xiao et al., arXiv:2309.17453).
        num_splits: parts that the KV axis of a sequence is cut into; None: chosen.
        batch_invariant: a row's bits do not depend on the rest of the batch, on page placement, or on the longest
            sequence.
        out: written and returned, of q's shape and dtype, sharing no memory with an input; None: a new tensor.
        return_lse: also return the log-sum-exp.

    Returns:
        The output ``[T, Hq, D]`` in q's dtype; with ``return_lse`` also the natural-log log-sum-exp, float32
        ``[T, Hq]``, sinks included. A row that sees no key is 0, with log-sum-exp -inf (with a sink: the sink).

    Raises:
        ValueError: an argument breaks one of these rules. On a CPU that includes lengths and page ids out of range.
        UnsupportedError: this build or machine has no kernel for the format, head_dim or device.

    Sequences of many query tokens take FlashAttention-2 (Dao, arXiv:2307.08691), the others the decoding kernels with
    their split KV axis; both under the online softmax of Milakov & Gimelshein (arXiv:1805.02867).

    >>> cache = KVCache.allocate(num_pages=2, page_size=16, num_kv_heads=1, head_dim=64)
    >>> slots = torch.tensor([0, 1, 2, 16])  # a prompt of 3 tokens on page 0, the first token of another on page 1
    >>> k, v = torch.randn(2, 4, 1, 64)
    >>> cache.append(k, v, slots)
    >>> ends, lens = torch.tensor([0, 3, 4], dtype=torch.int32), torch.tensor([3, 1], dtype=torch.int32)
    >>> out = hybrid_attention(torch.randn(4, 2, 64), cache, cu_seqlens_q=ends, seq_lens=lens)
    >>> torch.allclose(out[3], v[3].expand(2, 64), atol=0.05)
    True
    """
    if not isinstance(cache, KVCache):
        raise ValueError(f"hybrid_attention: cache must be a KVCache, got {type(cache).__name__}")
    if alibi_slopes is not None or sinks is not None:
        refuse_gradients("hybrid_attention", alibi_slopes=alibi_slopes, sinks=sinks)
    out, lse = make_outputs("hybrid_attention", q, out, return_lse)
    # fmt: off
    if torch.compiler.is_compiling():
        ops.hybrid_attention(
            q, cache.k, cache.v, cache.k_scale, cache.v_scale, cache.layout, cache.k_offset, out, lse, cu_seqlens_q,
            seq_lens, page_table, seq_starts, causal, sm_scale, alibi_slopes, sliding_window, logits_soft_cap, sinks,
            num_splits, batch_invariant,
        )
    else:
        _core.hybrid_attention(
            cache._handle, q, out, lse, cu_seqlens_q, seq_lens, page_table, seq_starts, causal, sm_scale, alibi_slopes,
            sliding_window, logits_soft_cap, sinks, num_splits, batch_invariant,
        )
    # fmt: on
    return out if lse is None else (out, lse)
