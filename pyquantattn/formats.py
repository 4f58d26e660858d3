"""The KV formats of this build, read from the extension's format table.

>>> kv_pair("fp16/int8").v.dtype
torch.int8
"""

from dataclasses import dataclass

import torch

from pyquantattn import _core


@dataclass(frozen=True)
class KvFormat:
    """One row of the format table: how an element of K or V is stored."""

    name: str
    dtype: torch.dtype
    code_bits: int
    has_scale: bool


@dataclass(frozen=True)
class KvPair:
    """The formats of K and of V in one cache."""

    name: str
    k: KvFormat
    v: KvFormat


KV_FORMATS: dict[str, KvFormat] = {
    name: KvFormat(name, getattr(torch, dtype), code_bits, has_scale)
    for name, dtype, code_bits, has_scale in _core.kv_formats()
}
KV_PAIRS: dict[str, KvPair] = {
    name: KvPair(name, KV_FORMATS[k_name], KV_FORMATS[v_name]) for name, k_name, v_name in _core.kv_pairs()
}


def kv_format(name: str, who: str) -> KvFormat:
    """The format called ``name``, for the operation ``who``."""
    if not isinstance(name, str) or name not in KV_FORMATS:
        raise ValueError(f"{who}: kv_format must be one of {', '.join(KV_FORMATS)}, got {name!r}")
    return KV_FORMATS[name]


def kv_pair(name: str, who: str = "KVCache") -> KvPair:
    """The pair called ``name``, ``"int8"`` or ``"fp16/int8"``, for the operation ``who``."""
    if not isinstance(name, str) or name not in KV_PAIRS:
        raise ValueError(f"{who}: kv_format must be one of {', '.join(KV_PAIRS)}, got {name!r}")
    return KV_PAIRS[name]
