"""Static scales as the caller gives them: numbers or tensors."""

import math

import torch
from torch import Tensor


def as_static_scale(scale: Tensor | float | None, device: torch.device | str, who: str) -> Tensor | None:
    """A static scale as a float32 tensor on ``device``; None stays None.

    Numbers and CPU tensors must be positive and finite. The values of a CUDA tensor are not read, because that would
    wait for the device.

    Args:
        scale: a number, or float32 ``[]`` or ``[H]``.
        device: where a number is put; a tensor stays where it is.
        who: the operation and the argument, for messages.

    Raises:
        ValueError: not a number or tensor, or not positive and finite.

    >>> as_static_scale(0.5, "cpu", "example: scale")
    tensor(0.5000)
    """
    if scale is None:
        return None
    if isinstance(scale, Tensor):
        if scale.device.type == "cpu" and scale.is_floating_point():
            _require_positive(bool(torch.all(torch.isfinite(scale) & (scale > 0))), who, scale)
        return scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ValueError(f"{who} must be a number, a tensor or None, got {type(scale).__name__}")
    value = torch.tensor(float(scale), dtype=torch.float32)
    _require_positive(math.isfinite(value.item()) and value.item() > 0, who, scale)
    return value.to(device)


def _require_positive(holds: bool, who: str, scale: Tensor | float) -> None:
    if not holds:
        raise ValueError(f"{who} must be positive and finite in float32, got {scale}")
