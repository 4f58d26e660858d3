"""The quantised KV cache: pages of encoded tokens."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyquantattn import _core, ops
from pyquantattn.codec import dequantize_kv
from pyquantattn.devices import as_device
from pyquantattn.formats import KvFormat, kv_pair
from pyquantattn.inference_only import refuse_gradients
from pyquantattn.scales import as_static_scale

if TYPE_CHECKING:
    from typing_extensions import Self


class KVCache:
    """Keys and values of many tokens, encoded, in pages.

    Shapes: N = num_pages, P = page_size, H = num_kv_heads, D = head_dim. With ``layout="NHD"`` codes are
    ``[N, P, H, D]`` and dynamic scales ``[N, P, H]``; with ``"HND"`` ``[N, H, P, D]`` and ``[N, H, P]``.
    A contiguous cache has one page for each sequence and needs no page table.

    Make one with :meth:`allocate` or :meth:`from_tensors`, which check the tensors, so that calls need not. The
    contents change in place; the attributes are read-only, and a tensor that is resized afterwards is refused.

    Attributes:
        k, v: codes, in the dtypes of the formats.
        k_scale, v_scale: dequantisation multipliers (x ~ code * scale), float16 per token and head, or float32 ``[]``
            or ``[H]``; None for 16-bit formats.
        k_offset: subtracted from keys before they are encoded, float32 ``[H, D]``; or None. Attention counts it back in
            exactly: k ~ code * k_scale + k_offset.
        layout: ``"NHD"`` or ``"HND"``.
        kv_format: name of the format pair, ``"int8"`` or ``"fp16/int8"``.

    >>> cache = KVCache.allocate(num_pages=4, page_size=16, num_kv_heads=8, head_dim=128)
    >>> cache
    KVCache(kv_format='int8', num_pages=4, page_size=16, num_kv_heads=8, head_dim=128, layout='NHD', device='cpu')
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    k_offset: Tensor | None
    layout: str
    kv_format: str
    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    _handle: _core.CacheHandle

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        layout: str = "NHD",
        k_offset: Tensor | None = None,
    ) -> None:
        refuse_gradients("KVCache", k=k, v=v, k_scale=k_scale, v_scale=v_scale, k_offset=k_offset)
        handle = _core.CacheHandle(k, v, k_scale, v_scale, layout, k_offset)
        sizes = {name: getattr(handle, name) for name in ("num_pages", "page_size", "num_kv_heads", "head_dim")}
        tensors = {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale, "k_offset": k_offset}
        self.__dict__.update(tensors, layout=layout, kv_format=handle.kv_format, _handle=handle, **sizes)
        for tensor in tensors.values():
            # What torch._dynamo.mark_static_address does, without the second that its import takes: CUDA graphs of
            # compiled functions may then write into the cache in place.
            if tensor is not None and tensor.is_cuda:
                tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"KVCache: {name} is read-only; make another cache with KVCache.from_tensors")

    def __reduce__(self) -> tuple[object, ...]:
        """Copies and pickles hold the tensors and the layout."""
        return KVCache, (self.k, self.v, self.k_scale, self.v_scale, self.layout, self.k_offset)

    @classmethod
    def allocate(
        cls,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        kv_format: str = "int8",
        device: torch.device | str = "cpu",
        layout: str = "NHD",
        k_scale: Tensor | float | None = None,
        v_scale: Tensor | float | None = None,
        k_offset: Tensor | None = None,
    ) -> "Self":
        """A new cache, all zeros.

        Args:
            num_pages, page_size, num_kv_heads, head_dim: sizes; ``num_pages`` may be 0.
            kv_format: a format (``"int8"``) or a pair (``"fp16/int8"``).
            device: where the tensors are put.
            layout: ``"NHD"`` or ``"HND"``.
            k_scale, v_scale: None for dynamic scales, one for each token and head, derived from the data on append;
                a number or a float32 tensor ``[]`` or ``[H]`` for a static scale, with which values saturate. Scales
                must be positive and finite: numbers and CPU tensors are checked, CUDA tensors are not read.
            k_offset: float32 ``[H, D]`` on ``device``, what keys of a head have in common, for example from
                :func:`estimate_k_offset`; None: nothing. Any format takes one. It must be finite, which is checked like
                scales, and keep its values while tokens are stored.

        Raises:
            ValueError: a size, name, scale or offset is out of range, or a 16-bit format is given a scale.
            RuntimeError: torch cannot allocate that much.

        >>> KVCache.allocate(2, 16, 8, 128, "fp8_e4m3", k_scale=0.5, v_scale=0.25).v_scale
        tensor(0.2500)
        """
        pair, device = kv_pair(kv_format, "KVCache.allocate"), as_device(device, "KVCache.allocate")
        _require_sizes(num_pages=num_pages, page_size=page_size, num_kv_heads=num_kv_heads, head_dim=head_dim)
        if layout not in ("NHD", "HND"):
            raise ValueError(f'KVCache.allocate: layout must be "NHD" or "HND", got {layout!r}')
        rows = (num_pages, page_size, num_kv_heads) if layout == "NHD" else (num_pages, num_kv_heads, page_size)

        def codes(row: KvFormat) -> Tensor:
            return _zeros((*rows, head_dim), row.dtype, device)

        def scale(row: KvFormat, given: Tensor | float | None, name: str) -> Tensor | None:
            if given is None and row.has_scale:
                return _zeros(rows, torch.float16, device)
            return as_static_scale(given, device, f"KVCache.allocate: {name}")

        k_scales, v_scales = scale(pair.k, k_scale, "k_scale"), scale(pair.v, v_scale, "v_scale")
        return cls(codes(pair.k), codes(pair.v), k_scales, v_scales, layout, k_offset)

    @classmethod
    def from_tensors(
        cls,
        k: Tensor,
        v: Tensor,
        k_scale: Tensor | float | None = None,
        v_scale: Tensor | float | None = None,
        layout: str = "NHD",
        k_offset: Tensor | None = None,
    ) -> "Self":
        """A cache over existing tensors, without a copy.

        Args:
            k, v: codes, ``[N, P, H, D]`` ("NHD") or ``[N, H, P, D]`` ("HND"); their dtypes (float16, bfloat16, int8,
                float8_e4m3fn, float8_e5m2) say the formats. D must be contiguous, other strides are free.
            k_scale, v_scale: a number or a float32 tensor ``[]`` or ``[H]`` (static), or float16 in the shape of the
                codes without D (dynamic); None exactly for 16-bit codes.
            layout: ``"NHD"`` or ``"HND"``.
            k_offset: what was subtracted from the keys before they were encoded, float32 ``[H, D]``, D contiguous;
                None: nothing.

        Raises:
            ValueError: a tensor breaks one of these rules, or needs gradients while they are recorded. Quantised codes
                without scales are refused.
            UnsupportedError: this build has no such pair of formats.

        >>> k = torch.zeros(2, 16, 8, 64, dtype=torch.int8)
        >>> KVCache.from_tensors(k, k.clone(), k_scale=0.01, v_scale=0.02).kv_format
        'int8'
        """
        if not isinstance(k, Tensor):
            raise ValueError(f"KVCache: k must be a torch.Tensor, got {type(k).__name__}")
        k_scales = as_static_scale(k_scale, k.device, "KVCache.from_tensors: k_scale")
        v_scales = as_static_scale(v_scale, k.device, "KVCache.from_tensors: v_scale")
        return cls(k, v, k_scales, v_scales, layout, k_offset)

    def append(self, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        """Encodes new rows of K and V and writes codes and scales into the cache, in one launch.

        Args:
            k, v: ``[T, H, D]``, both float32, float16 or bfloat16, D contiguous.
            slot_mapping: int64 ``[T]``, for each row ``page * page_size + offset``; -1 skips the row.

        On a CPU a slot outside the cache raises and nothing is written; on CUDA, where slots are not read on the
        host, its row is skipped. Slots of one call must be distinct; a CPU keeps the last of equal ones.

        Raises:
            ValueError: a tensor breaks one of these rules, or needs gradients while they are recorded.

        >>> cache = KVCache.allocate(1, 4, 1, 64)
        >>> cache.append(torch.ones(1, 1, 64), torch.ones(1, 1, 64), torch.tensor([2]))
        >>> cache.k[0, :, 0, 0]
        tensor([  0,   0, 127,   0], dtype=torch.int8)
        """
        refuse_gradients("append_kv", k=k, v=v)
        if torch.compiler.is_compiling():
            ops.append_kv(self.k, self.v, self.k_scale, self.v_scale, self.layout, self.k_offset, k, v, slot_mapping)
        else:
            _core.append_kv(self._handle, k, v, slot_mapping)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """All keys and values as numbers, in the cache's layout: for tests and for code that cannot read codes.

        Args:
            dtype: float32, float16 or bfloat16.

        Returns:
            k and v, each of the shape of the codes.

        >>> k, v = KVCache.allocate(1, 4, 1, 64).dequantize()
        >>> k.shape
        torch.Size([1, 4, 1, 64])
        """
        if self.layout == "NHD":
            k = dequantize_kv(self.k, self.k_scale, dtype, self.k_offset)
            return k, dequantize_kv(self.v, self.v_scale, dtype)
        k = dequantize_kv(self.k.transpose(1, 2), _transposed(self.k_scale), dtype, self.k_offset)
        v = dequantize_kv(self.v.transpose(1, 2), _transposed(self.v_scale), dtype)
        return k.transpose(1, 2), v.transpose(1, 2)

    @property
    def device(self) -> torch.device:
        """The device of all tensors of the cache."""
        return self.k.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and the offset."""
        tensors = (self.k, self.v, self.k_scale, self.v_scale, self.k_offset)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    @property
    def bits_per_element(self) -> float:
        """Stored bits for each number of K and V, scales and the offset included.

        >>> KVCache.allocate(64, 16, 8, 128).bits_per_element
        8.125
        """
        num_elements = self.k.numel() + self.v.numel()
        if num_elements == 0:
            return 8 * (self.k.element_size() + self.v.element_size()) / 2
        return 8 * self.nbytes / num_elements

    def __repr__(self) -> str:
        sizes = f"num_pages={self.num_pages}, page_size={self.page_size}, num_kv_heads={self.num_kv_heads}"
        return (
            f"KVCache(kv_format={self.kv_format!r}, {sizes}, head_dim={self.head_dim}, layout={self.layout!r}, "
            f"device='{self.device}')"
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, on a CPU in huge pages: a step reads rows all over the cache, and small pages slow it by a tenth."""
    memory = torch.empty(shape, dtype=dtype, device=device)
    if memory.is_cpu and type(memory) is Tensor:
        _core.advise_huge_pages(memory.data_ptr(), memory.nbytes)
    return memory.zero_()


def _require_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        least = 0 if name == "num_pages" else 1
        if isinstance(size, bool) or not isinstance(size, int) or not least <= size < 2**63:
            raise ValueError(f"KVCache.allocate: {name} must be an int of at least {least}, got {size!r}")


def _transposed(scale: Tensor | None) -> Tensor | None:
    return scale.transpose(1, 2) if scale is not None and scale.ndim == 3 else scale
