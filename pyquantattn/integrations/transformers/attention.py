"""The attention function that transformers calls for ``attn_implementation="pyquantattn"``."""

from typing import Any

import torch
from torch import Tensor, nn

from pyquantattn import ops
from pyquantattn.decode import decode_attention
from pyquantattn.hybrid import hybrid_attention
from pyquantattn.integrations.transformers.dense_attention import Scoring, dense_attention
from pyquantattn.integrations.transformers.key_spans import KeySpans
from pyquantattn.integrations.transformers.quantized_kv import QuantizedKV
from pyquantattn.integrations.transformers.read_counts import count_exact, count_quantized
from pyquantattn.runtime import available_backends, supports

# Query tokens of a sequence that one call of the decoding kernels takes.
_MAX_QUERY_TOKENS = 16
# Backends that take any number. On them hybrid_attention serves whatever decode_attention does.
_HYBRID_BACKENDS = tuple(
    name for name in available_backends() if supports("int8", 128, operation="hybrid_attention", device=name)
)


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    output_attentions: bool = False,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' interface calls it, over quantised or plain K and V.

    Shapes: B sequences, n query tokens, Hq query heads, H key and value heads, D = head_dim.

    Args:
        module: the attention layer.
        query: ``[B, Hq, n, D]``.
        key, value: ``[B, H, size, D]``: what ``QuantizedCache.update`` returned, or plain tensors.
        attention_mask: None, ``KeySpans``, or a mask that broadcasts to ``[B, Hq, n, size]``, boolean (True: visible)
            or added to the scores.
        dropout: probability; only plain K and V are dropped out.
        scaling: multiplies q.k; None: 1 / sqrt(D).
        is_causal: None: what the module says.
        softcap, s_aux: soft cap and attention sinks ``[Hq]``, as transformers names them.
        position_bias: added to the scores, broadcast to ``[B, Hq, n, size]``.
        alibi_slopes: float32 ``[Hq]``; slope * (j - p) joins the score.
        output_attentions: must be False: weights are not formed.
        unused: keywords that, as in transformers' SDPA function, carry nothing that the mask does not say.

    Returns:
        ``[B, n, Hq, D]``, contiguous, and None.

    Raises:
        ValueError: ``output_attentions`` is asked for.
    """
    if output_attentions:
        raise ValueError(
            'pyquantattn attention: output_attentions must be False, got True; use attn_implementation="eager"'
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scoring = Scoring(scaling, softcap, s_aux, alibi_slopes, position_bias, causal, dropout)
    mask = attention_mask
    if isinstance(key, QuantizedKV) and isinstance(value, QuantizedKV):
        if key.fresh is not None and value.fresh is not None:
            key, value = key.fresh, value.fresh
        elif _is_readable(query, mask, scoring):
            spans = mask if isinstance(mask, KeySpans) else None
            return _read_quantized(query, key, value, spans, scoring), None
    if isinstance(key, QuantizedKV) or isinstance(value, QuantizedKV):
        # Every operation of torch dequantises; doing it here once keeps it to one time.
        key, value = (x.materialize() if isinstance(x, QuantizedKV) else x for x in (key, value))
    else:
        count_exact()
    mask = mask.dense() if isinstance(mask, KeySpans) else mask
    return dense_attention(module, query, key, value, mask, scoring), None


def _is_readable(query: Tensor, mask: Tensor | None, scoring: Scoring) -> bool:
    """Whether the kernels can express the call. A single query token sees all keys, so causality is moot for it."""
    has_spans = isinstance(mask, KeySpans) or (mask is None and (scoring.is_causal or query.shape[2] == 1))
    return has_spans and scoring.position_bias is None and scoring.dropout == 0.0


def _read_quantized(
    query: Tensor, key: QuantizedKV, value: QuantizedKV, spans: KeySpans | None, scoring: Scoring
) -> Tensor:
    """Attends over the codes: in one call where the backend takes any number of query tokens, else 16 at a time, of
    which the earlier ones see a shorter sequence."""
    count_quantized()
    q = query.transpose(1, 2)
    if q.stride(-1) != 1:
        q = q.contiguous()
    windows = [window for window in (key.window, spans.window if spans is not None else 0) if window]
    options = {
        "page_table": key.page_table,
        "seq_starts": None if spans is None else spans.starts,
        "sm_scale": scoring.scaling,
        "alibi_slopes": scoring.alibi_slopes,
        "sliding_window": min(windows) if windows else None,
        "logits_soft_cap": scoring.softcap,
        "sinks": None if scoring.sinks is None else scoring.sinks.float(),
    }
    num_queries = q.shape[1]
    if num_queries <= _MAX_QUERY_TOKENS:
        return _decode(q, key, value, key.seq_lens, None, options)
    if q.device.type in _HYBRID_BACKENDS:
        return _prefill(q, key, value, options)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for begin in range(0, num_queries, _MAX_QUERY_TOKENS):
        end = min(begin + _MAX_QUERY_TOKENS, num_queries)
        seq_lens = key.seq_lens if end == num_queries else key.seq_lens - (num_queries - end)
        _decode(q[:, begin:end], key, value, seq_lens, out[:, begin:end], options)
    return out


def _prefill(q: Tensor, key: QuantizedKV, value: QuantizedKV, options: dict[str, Any]) -> Tensor:
    batch_size, num_queries = q.shape[:2]
    ends = num_queries * torch.arange(batch_size + 1, dtype=torch.int32, device=q.device)
    rows = q.flatten(0, 1)
    if key.cache is not None:
        out = hybrid_attention(rows, key.cache, cu_seqlens_q=ends, seq_lens=key.seq_lens, **options)
    else:
        out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        # Compiling: the handles carry tensors only, and the operator takes those.
        ops.hybrid_attention(
            rows, key.codes, value.codes, key.scale, value.scale, key.cache_layout, key.offset, out, None, ends,
            key.seq_lens, causal=True, num_splits=None, batch_invariant=False, **options,
        )  # fmt: skip
    attended: Tensor = out.view(batch_size, num_queries, *out.shape[1:])
    return attended


def _decode(
    q: Tensor, key: QuantizedKV, value: QuantizedKV, seq_lens: Tensor, out: Tensor | None, options: dict[str, Any]
) -> Tensor:
    if key.cache is not None:
        attended: Tensor = decode_attention(q, key.cache, seq_lens=seq_lens, out=out, **options)
        return attended
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Compiling: the handles carry tensors only, and the operator takes those.
    ops.decode_attention(
        q, key.codes, value.codes, key.scale, value.scale, key.cache_layout, key.offset, out, None, seq_lens,
        num_splits=None, batch_invariant=False, **options,
    )  # fmt: skip
    return out
