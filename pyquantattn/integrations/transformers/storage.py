"""Codes of one model layer: equally long sequences, whole or as a ring that holds the latest tokens only."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyquantattn._core import UnsupportedError
from pyquantattn.codec import dequantize_kv
from pyquantattn.formats import kv_pair
from pyquantattn.kv_cache import KVCache
from pyquantattn.runtime import supports

# Tokens in a page of a ring. A whole sequence is one page.
RING_PAGE_SIZE = 64


class LayerStorage:
    """A ``KVCache`` of ``batch_size`` sequences with ``capacity`` tokens each.

    Token p of sequence b is in slot ``b * capacity + p % capacity``. Without a ring, p never reaches the capacity and
    a sequence is one page. In a ring the page table repeats itself, so that kernels go on counting tokens from the
    start of the sequence while old pages are written over.

    >>> storage = LayerStorage(1, 128, 2, 64, "int8", torch.device("cpu"), is_ring=True)
    >>> storage.page_table(num_tokens=256)
    tensor([[0, 1, 0, 1]], dtype=torch.int32)
    """

    def __init__(
        self,
        batch_size: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        kv_format: str,
        device: torch.device,
        is_ring: bool = False,
        k_scale: Tensor | float | None = None,
        v_scale: Tensor | float | None = None,
        k_offset: Tensor | None = None,
    ) -> None:
        page_size = RING_PAGE_SIZE if is_ring else capacity
        self.batch_size, self.capacity, self.is_ring = batch_size, capacity, is_ring
        self.pages_per_sequence = capacity // page_size
        num_pages = batch_size * self.pages_per_sequence
        # Token-major pages make a ring addressable as one axis; a whole sequence is read head by head.
        layout = "NHD" if is_ring else "HND"
        self.cache = KVCache.allocate(
            num_pages, page_size, num_kv_heads, head_dim, kv_format, device, layout, k_scale, v_scale, k_offset
        )
        self._page_table: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    @property
    def shared_nbytes(self) -> int:
        """Bytes of what no token has for itself: static scales and the key offset."""
        scales = (static_part(self.cache.k_scale), static_part(self.cache.v_scale))
        return sum(tensor.nbytes for tensor in (*scales, self.cache.k_offset) if tensor is not None)

    def page_table(self, num_tokens: int) -> Tensor | None:
        """int32 ``[B, pages]`` for sequences of up to ``num_tokens``; None without a ring."""
        if not self.is_ring:
            return None
        num_pages = -(-num_tokens // RING_PAGE_SIZE)
        if self._page_table is None or self._page_table.shape[1] < num_pages:
            pages = torch.arange(2 * num_pages if self._page_table is not None else num_pages, device=self.cache.device)
            first = torch.arange(self.batch_size, device=self.cache.device)[:, None] * self.pages_per_sequence
            self._page_table = (first + pages % self.pages_per_sequence).to(torch.int32)
        return self._page_table

    def write(self, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        """Encodes ``[B, H, n, D]`` into int64 ``[B * n]`` slots."""
        self.cache.append(_rows(k), _rows(v), slot_mapping)

    def dequantize(self, first: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K and V of tokens [first, first + size) as ``[B, H, size, D]``."""
        cache = self.cache
        sides = ((cache.k, cache.k_scale, cache.k_offset), (cache.v, cache.v_scale, None))
        k, v = (dequantized(*side, self.capacity, cache.layout, first, size, dtype) for side in sides)
        return k, v

    def resized(self, capacity: int, first: int, size: int) -> "LayerStorage":
        """A copy with another capacity that holds tokens [first, first + size)."""
        old = self.cache
        new = LayerStorage(
            self.batch_size, capacity, old.num_kv_heads, old.head_dim, old.kv_format, old.device, self.is_ring,
            static_part(old.k_scale), static_part(old.v_scale), old.k_offset,
        )  # fmt: skip
        for source, target in zip(self._sides(), new._sides(), strict=True):
            tokens = torch.arange(first, first + size, device=old.device)
            target[:, tokens % capacity] = source[:, tokens % self.capacity]
        return new

    def apply_to_sequences(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor by ``choose`` of it, its first axis split to ``[B, pages]``; B may change. What is
        shared by all sequences follows to the device of the codes."""
        old = self.cache

        def chosen(tensor: Tensor) -> Tensor:
            # The first axis holds a whole number of pages for each sequence; bytes are moved, whatever the dtype.
            return choose(tensor.unflatten(0, (self.batch_size, -1))).flatten(0, 1)

        k, v = chosen(old.k), chosen(old.v)

        def moved(shared: Tensor | None) -> Tensor | None:
            return None if shared is None else shared.to(k.device)

        k_scale, v_scale = (
            chosen(scale) if scale is not None and static_part(scale) is None else moved(scale)
            for scale in (old.k_scale, old.v_scale)
        )
        self.cache = KVCache(k, v, k_scale, v_scale, old.layout, moved(old.k_offset))
        self.batch_size = self.cache.num_pages // self.pages_per_sequence
        self._page_table = None

    def _sides(self) -> list[Tensor]:
        """Codes and dynamic scales as ``[B, capacity, H(, D)]`` views of bytes that torch can index."""
        cache = self.cache
        tensors = (cache.k, cache.v, cache.k_scale, cache.v_scale)
        written = [tensor for tensor in tensors if tensor is not None and static_part(tensor) is None]
        return [as_bytes(tokens_first(tensor, self.capacity, cache.layout)) for tensor in written]


def static_part(scale: Tensor | None) -> Tensor | None:
    """The scale if it is static, to be carried over; None if it is data, one for each token."""
    return scale if scale is not None and scale.ndim < 2 else None


def tokens_first(tensor: Tensor, capacity: int, layout: str) -> Tensor:
    """Codes or dynamic scales of whole sequences or rings as ``[B, capacity, H(, D)]``, without a copy."""
    return tensor.transpose(1, 2) if layout == "HND" else tensor.view(-1, capacity, *tensor.shape[2:])


def as_bytes(tensor: Tensor) -> Tensor:
    """FP8 as int8, since torch indexes those everywhere; others unchanged."""
    return tensor.view(torch.int8) if tensor.element_size() == 1 else tensor


def dequantized(
    codes: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    capacity: int,
    layout: str,
    first: int,
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Tokens [first, first + size) of one side of a cache as ``[B, H, size, D]``."""
    codes = tokens_first(codes, capacity, layout)
    is_dynamic = scale is not None and static_part(scale) is None
    if is_dynamic and scale is not None:
        scale = tokens_first(scale, capacity, layout)
    if layout == "NHD":
        tokens = torch.arange(first, first + size, device=codes.device) % capacity
        codes = as_bytes(codes)[:, tokens].view(codes.dtype)
        scale = scale[:, tokens] if is_dynamic and scale is not None else scale
    else:
        codes = codes[:, first : first + size]
        scale = scale[:, first : first + size] if is_dynamic and scale is not None else scale
    return dequantize_kv(codes, scale, dtype, offset).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """``[B, H, n, D]`` as ``[B * n, H, D]`` with contiguous rows: the order of the slots."""
    rows = x.squeeze(2) if x.shape[2] == 1 else x.transpose(1, 2).flatten(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def check_kernel(kv_format: str, num_kv_heads: int, k: Tensor, v: Tensor, layer_name: str) -> None:
    """Raises before anything is allocated where decoding could not read the layer."""
    name = kv_pair(kv_format, "QuantizedCache").name
    k_dim, v_dim = k.shape[-1], v.shape[-1]
    if k_dim != v_dim:
        raise UnsupportedError(
            f"QuantizedCache: {layer_name} must have one head_dim for K and V, got {k_dim} and {v_dim}"
        )
    if not supports(name, k_dim, num_q_heads=num_kv_heads, num_kv_heads=num_kv_heads, q_dtype=k.dtype, device=k.device):
        raise UnsupportedError(
            f"QuantizedCache: {layer_name} needs a decoding kernel for {name}, head_dim {k_dim} and {k.dtype} on "
            f"{k.device}, which this build or machine does not have; see python -m pyquantattn.doctor"
        )
