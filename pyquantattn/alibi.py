"""Slopes of attention with linear biases."""

import torch

from pyquantattn import _core
from pyquantattn.devices import as_device


def get_alibi_slopes(num_heads: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The slopes of ALiBi (Press et al., arXiv:2108.12409), for every head count.

    A rank of a tensor-parallel model takes the slopes of all heads and passes its own slice.

    Args:
        num_heads: query heads of the whole model, at least 1.
        device: where the slopes are put.

    Returns:
        float32 ``[num_heads]``, to be passed as ``alibi_slopes``.

    Raises:
        ValueError: ``num_heads`` is not a positive integer, or torch knows no such device.

    >>> get_alibi_slopes(4)
    tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or not 1 <= num_heads < 2**31:
        raise ValueError(f"get_alibi_slopes: num_heads must be an int of at least 1, got {num_heads!r}")
    return torch.tensor(
        _core.get_alibi_slopes(num_heads), dtype=torch.float32, device=as_device(device, "get_alibi_slopes")
    )
