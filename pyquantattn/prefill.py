"""Attention of whole prompts over fresh K and V."""

from typing import Literal, overload

import torch
from torch import Tensor

from pyquantattn import _core, ops
from pyquantattn.inference_only import refuse_gradients
from pyquantattn.outputs import make_outputs


@overload
def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = ...,
    seq_starts: Tensor | None = ...,
    causal: bool = ...,
    sm_scale: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    sliding_window: int | None = ...,
    logits_soft_cap: float | None = ...,
    sinks: Tensor | None = ...,
    out: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = ...,
    seq_starts: Tensor | None = ...,
    causal: bool = ...,
    sm_scale: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    sliding_window: int | None = ...,
    logits_soft_cap: float | None = ...,
    sinks: Tensor | None = ...,
    out: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    seq_starts: Tensor | None = None,
    causal: bool = True,
    sm_scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of whole prompts over K and V that no cache holds: exact softmax, sequences of any length in one call.

    Shapes: B sequences, laid one after another: T query tokens and S keys of all of them together, Hq query heads,
    H key and value heads with Hq a multiple of H, D = head_dim. Query token i of the n query tokens of a sequence with
    L keys stands at position p = L - n + i (causal order is bottom-right aligned) and sees key j where
    ``seq_starts[b] <= j < L`` and, with ``causal``, ``j <= p``. All tensors are on the device of q. A row's bits never
    depend on the rest of the batch or on the number of threads.

    Args:
        q: ``[T, Hq, D]``, float32, float16 or bfloat16.
        k, v: ``[S, H, D]``, of q's dtype. In q, k and v D is contiguous and other strides are free, so that they may
            be slices of one fused projection: nothing is copied.
        cu_seqlens_q: int32 ``[B + 1]``, the first query token of each sequence, then T: 0 first, never decreasing.
        cu_seqlens_k: int32 ``[B + 1]``, the same of the keys, S last; None: that of the queries.
        seq_starts: int32 ``[B]``, first visible key of each sequence (left padding); None: 0.
        causal: a query token sees no key behind its position; False: it sees all keys.
        sm_scale: multiplies q.k; None: 1 / sqrt(D).
        alibi_slopes: float32 ``[Hq]`` or ``[B, Hq]``; slope * (j - p) joins the score (Press et al.,
            arXiv:2108.12409), also where j > p.
        sliding_window: keys that a query token sees up to its position, itself included; None: all. Without
            ``causal`` it bounds the past alone.
        logits_soft_cap: scores become cap * tanh(score / cap), before ALiBi; None: no cap.
        sinks: float32 ``[Hq]``, a logit for each head that joins the denominator (Xiao et al., arXiv:2309.17453).
        out: written and returned, of q's shape and dtype, sharing no memory with an input; None: a new tensor.
        return_lse: also return the log-sum-exp.

    Returns:
        The output ``[T, Hq, D]`` in q's dtype; with ``return_lse`` also the natural-log log-sum-exp, float32
        ``[T, Hq]``, sinks included. A row that sees no key is 0, with log-sum-exp -inf (with a sink: the sink).

    Raises:
        ValueError: an argument breaks one of these rules.
        UnsupportedError: this build or machine has no kernel for the dtype, head_dim or device. CUDA devices have
            kernels for float16 and bfloat16.

    The algorithm is FlashAttention-2 (Dao, arXiv:2307.08691): tiles of keys under the online softmax of Milakov &
    Gimelshein (arXiv:1805.02867), so that no score matrix is ever stored.

    >>> qkv = torch.randn(5, 4 + 2 + 2, 64)  # two prompts of 2 and 3 tokens, 4 query heads over 2 KV heads
    >>> q, k, v = qkv.split((4, 2, 2), dim=1)
    >>> out = prefill_attention(q, k, v, cu_seqlens_q=torch.tensor([0, 2, 5], dtype=torch.int32))
    >>> torch.allclose(out[2], v[2].repeat_interleave(2, dim=0))  # the first token of a prompt sees only itself
    True
    """
    if torch.is_grad_enabled():
        refuse_gradients("prefill_attention", k=k, v=v, alibi_slopes=alibi_slopes, sinks=sinks)
    out, lse = make_outputs("prefill_attention", q, out, return_lse)
    # fmt: off
    if torch.compiler.is_compiling():
        ops.prefill_attention(
            q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seq_starts, causal, sm_scale, alibi_slopes, sliding_window,
            logits_soft_cap, sinks,
        )
    else:
        _core.prefill_attention(
            q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seq_starts, causal, sm_scale, alibi_slopes, sliding_window,
            logits_soft_cap, sinks,
        )
    # fmt: on
    return out if lse is None else (out, lse)
