"""Key offsets: what all keys of a head have in common, taken out before they are encoded."""

import torch
from torch import Tensor

from pyquantattn.inference_only import refuse_gradients


def estimate_k_offset(k: Tensor) -> Tensor:
    """The mean key of each KV head, as an offset for a cache.

    Some models give every key of a head the same large vector: the bias of a key projection, as in Qwen2.5, or a few
    outlier channels, as in Llama. It takes the codes' range, and what tells tokens apart gets the rest. A cache with
    this offset stores k - offset; its attention stays exact for any offset, so that an estimate need not be good.

    Take the keys as they would be appended, after rotary embeddings: a bias before them turns with the position, and
    only what it adds to slowly rotating channels is left in the mean (K smoothing: Zhang et al., arXiv:2410.02367).

    Args:
        k: ``[..., H, D]``, keys of some tokens, float32, float16 or bfloat16; a few hundred are enough.

    Returns:
        float32 ``[H, D]``, contiguous, on k's device.

    Raises:
        ValueError: ``k`` has no tokens, another shape or dtype, or needs gradients while they are recorded.

    >>> from pyquantattn import KVCache
    >>> k = torch.randn(256, 2, 64) + 100.0
    >>> cache = KVCache.allocate(1, 256, 2, 64, k_offset=estimate_k_offset(k))
    >>> cache.append(k, k, torch.arange(256))
    >>> bool((cache.dequantize()[0][0] - k).abs().max() < 0.05)
    True
    """
    if not isinstance(k, Tensor):
        raise ValueError(f"estimate_k_offset: k must be a torch.Tensor, got {type(k).__name__}")
    if k.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"estimate_k_offset: k must be float32, float16 or bfloat16, got {k.dtype}")
    if k.ndim < 3 or k.numel() == 0:
        raise ValueError(f"estimate_k_offset: k must have shape [..., H, D] and some tokens, got {list(k.shape)}")
    refuse_gradients("estimate_k_offset", k=k)
    return k.flatten(0, -3).mean(0, dtype=torch.float32).contiguous()
