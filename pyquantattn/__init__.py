"""Attention for LLM inference directly over a quantised KV cache.

>>> import torch
>>> import pyquantattn
>>> cache = pyquantattn.KVCache.allocate(num_pages=2, page_size=16, num_kv_heads=2, head_dim=64, kv_format="int8")
>>> cache.append(torch.randn(3, 2, 64), torch.randn(3, 2, 64), torch.tensor([0, 1, 16]))
>>> seq_lens = torch.tensor([2, 1], dtype=torch.int32)
>>> pyquantattn.decode_attention(torch.randn(2, 8, 64), cache, seq_lens=seq_lens).shape
torch.Size([2, 8, 64])
"""

try:
    import torch as _torch
except ModuleNotFoundError as _error:
    if _error.name != "torch":
        raise
    raise ImportError(
        "pyquantattn needs PyTorch 2.4 or newer, which is not installed: run `pip install torch`, "
        "or see https://pytorch.org/get-started for a build that fits this machine"
    ) from None

if tuple(int(part) for part in _torch.__version__.split(".")[:2]) < (2, 4):
    raise ImportError(f"pyquantattn needs PyTorch 2.4 or newer, got {_torch.__version__}: run `pip install -U torch`")

from pyquantattn._core import UnsupportedError
from pyquantattn._core import version as _version
from pyquantattn.alibi import get_alibi_slopes
from pyquantattn.codec import dequantize_kv, quantize_kv
from pyquantattn.decode import decode_attention
from pyquantattn.hybrid import hybrid_attention
from pyquantattn.key_offset import estimate_k_offset
from pyquantattn.kv_cache import KVCache
from pyquantattn.merge import merge_states
from pyquantattn.prefill import prefill_attention
from pyquantattn.runtime import (
    LastKernel,
    available_backends,
    force_kernel,
    get_num_threads,
    last_kernel,
    set_num_threads,
    supports,
)

__version__ = _version()

__all__ = [
    "KVCache",
    "LastKernel",
    "UnsupportedError",
    "available_backends",
    "decode_attention",
    "dequantize_kv",
    "estimate_k_offset",
    "force_kernel",
    "get_alibi_slopes",
    "get_num_threads",
    "hybrid_attention",
    "last_kernel",
    "merge_states",
    "prefill_attention",
    "quantize_kv",
    "set_num_threads",
    "supports",
]
