"""Static scales as the caller gives them: numbers or tensors."""

import torch
from torch import Tensor

# Numbers outside become zero or infinite in float32.
_SMALLEST, _LARGEST = 2.0**-149, 3.4028234e38


def as_static_scale(scale: Tensor | float | None, device: torch.device | str, who: str) -> Tensor | None:
    """A scale as a tensor: a number becomes float32 on ``device``; None and tensors stay as they are.

    Numbers must be positive and finite. So must the values of CPU tensors, which the extension checks; CUDA tensors
    are not read, because that would wait for the device.

    Args:
        scale: a number, or a tensor whose dtype and shape the extension checks.
        device: where a number is put.
        who: the operation and the argument, for messages.

    Raises:
        ValueError: neither a number nor a tensor, or not positive and finite.

    >>> as_static_scale(0.5, "cpu", "example: scale")
    tensor(0.5000)
    """
    if scale is None or isinstance(scale, Tensor):
        return scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ValueError(f"{who} must be a number, a tensor or None, got {type(scale).__name__}")
    if not _SMALLEST <= scale <= _LARGEST:
        raise ValueError(f"{who} must be positive and finite in float32, got {scale}")
    return torch.tensor(float(scale), dtype=torch.float32, device=device)
