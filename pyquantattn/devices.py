"""Devices as the caller names them."""

import torch


def as_device(device: torch.device | str, who: str) -> torch.device:
    """The device of that name, for the operation ``who``.

    Raises:
        ValueError: torch knows no such device.

    >>> as_device("cpu", "example")
    device(type='cpu')
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"{who}: device must be a torch.device or its name, got {device!r}") from None
