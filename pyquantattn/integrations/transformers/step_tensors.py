"""Lengths and slots of one decoding step, made once and shared by all layers of a model."""

import torch
from torch import Tensor

# Kinds of layer in a model (whole, sliding) times two tensors, with room for a second batch size.
_MAX_TENSORS = 8


class StepTensors:
    """Remembers the latest few tensors, so that a layer does not launch the kernels that the layer before launched.

    >>> steps = StepTensors()
    >>> steps.slot_mapping(2, 100, 7, 2, torch.device("cpu"))
    tensor([  7,   8, 107, 108])
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[object, ...], Tensor] = {}

    def seq_lens(self, batch_size: int, length: int, device: torch.device) -> Tensor:
        """int32 ``[B]``, every sequence ``length`` tokens long."""
        key = ("seq_lens", batch_size, length, device)
        if key not in self._tensors:
            self._remember(key, torch.full((batch_size,), length, dtype=torch.int32, device=device))
        return self._tensors[key]

    def slot_mapping(self, batch_size: int, capacity: int, start: int, num_tokens: int, device: torch.device) -> Tensor:
        """int64 ``[B * n]``: the slots of tokens [start, start + n) of each sequence."""
        key = ("slot_mapping", batch_size, capacity, start, num_tokens, device)
        if key not in self._tensors:
            positions = torch.arange(start, start + num_tokens, device=device) % capacity
            sequences = torch.arange(batch_size, device=device)[:, None]
            self._remember(key, (sequences * capacity + positions).flatten())
        return self._tensors[key]

    def _remember(self, key: tuple[object, ...], tensor: Tensor) -> None:
        if len(self._tensors) >= _MAX_TENSORS:
            self._tensors.pop(next(iter(self._tensors)))
        self._tensors[key] = tensor
