"""What a cache hands to attention in place of a key or value tensor: the quantised storage, dressed as that tensor."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyquantattn.integrations.transformers.read_counts import count_dequantized
from pyquantattn.integrations.transformers.stand_in import StandInTensor
from pyquantattn.integrations.transformers.storage import dequantized
from pyquantattn.kv_cache import KVCache

_TENSOR_NAMES = ("codes", "scale", "offset", "seq_lens", "page_table", "fresh")


class QuantizedKV(StandInTensor):
    """Keys or values of a layer, of logical shape ``[B, H, size, D]`` in the model's dtype.

    The attention function of this package reads ``codes``, ``scale`` and ``offset`` in place. Every other operation
    gets numbers: it dequantises, which is right for any model and costs what a 16-bit cache costs.

    Attributes:
        codes, scale, page_table: of one side of a ``KVCache``.
        offset: the cache's ``k_offset``; None for values.
        seq_lens: int32 ``[B]``, tokens of each sequence, the newest included.
        fresh: the first keys or values of an empty cache as the model made them, where attention shall read those;
            else None.
        cache_layout: of the codes.
        capacity: tokens that the storage holds for each sequence.
        first: position of the first logical key.
        window: keys that a query sees, where the storage holds no more; else 0.
        cache: the ``KVCache``; None while compiling.
    """

    codes: Tensor
    scale: Tensor | None
    offset: Tensor | None
    seq_lens: Tensor
    page_table: Tensor | None
    fresh: Tensor | None
    cache: KVCache | None

    # Constants are passed one by one: torch.compile passes only tensors and plain constants to a tensor subclass.
    @staticmethod
    def __new__(
        cls,
        codes: Tensor,
        scale: Tensor | None,
        offset: Tensor | None,
        seq_lens: Tensor,
        page_table: Tensor | None,
        fresh: Tensor | None,
        layout: str,
        capacity: int,
        first: int,
        size: int,
        window: int,
        dtype: torch.dtype,
    ) -> "QuantizedKV":
        num_heads = codes.shape[1] if layout == "HND" else codes.shape[2]
        shape = (seq_lens.shape[0], num_heads, size, codes.shape[3])
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor | None,
        offset: Tensor | None,
        seq_lens: Tensor,
        page_table: Tensor | None,
        fresh: Tensor | None,
        layout: str,
        capacity: int,
        first: int,
        size: int,
        window: int,
        dtype: torch.dtype,
    ) -> None:
        self.codes, self.scale, self.offset = codes, scale, offset
        self.seq_lens, self.page_table, self.fresh = seq_lens, page_table, fresh
        self.cache_layout, self.capacity, self.first, self.window = layout, capacity, first, window
        self.cache = None

    def materialize(self) -> Tensor:
        """The numbers, ``[B, H, size, D]``, with the strides that this tensor says it has."""
        count_dequantized()
        numbers = dequantized(
            self.codes, self.scale, self.offset, self.capacity, self.cache_layout, self.first, self.shape[2], self.dtype
        ).contiguous()
        if self.fresh is not None:
            # A first prompt: a ring may not hold all of it, and attention shall read it as the model made it.
            numbers[:, :, : self.fresh.shape[2]] = self.fresh
        return numbers

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        names = [name for name in _TENSOR_NAMES if getattr(self, name) is not None]
        return names, (self.cache_layout, self.capacity, self.first, self.shape[2], self.window, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        tensors: Mapping[str, Tensor], constants: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> "QuantizedKV":
        return QuantizedKV(*(tensors.get(name) for name in _TENSOR_NAMES), *constants)  # type: ignore[arg-type]
