"""The independent reference: every format and operation in NumPy float64.

It is written from the prose of docs/semantics.md and docs/formats.md, shares no code with the package under test
and never uses a cast of torch.
"""

from .attention import decode_attention, get_alibi_slopes, hybrid_attention, merge_states, prefill_attention
from .codecs import FORMATS, Format, dequantize, dynamic_scale, quantize, split_pair

__all__ = [
    "FORMATS",
    "Format",
    "decode_attention",
    "dequantize",
    "dynamic_scale",
    "get_alibi_slopes",
    "hybrid_attention",
    "merge_states",
    "prefill_attention",
    "quantize",
    "split_pair",
]
