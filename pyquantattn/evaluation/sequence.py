"""One sequence whose attention reads quantised caches alone: every K and V row is encoded before it is seen."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from pyquantattn import KVCache, decode_attention, dequantize_kv, estimate_k_offset, quantize_kv
from pyquantattn.evaluation.exact import AttentionOptions
from pyquantattn.evaluation.spec import CacheSpec, LayerSpec
from pyquantattn.formats import KvFormat

PAGE_SIZE = 16
MAX_QUERY_TOKENS = 16  # of one decode call
ABLATION_CONTAINER = "fp16"  # K-only and V-only: code * scale, rounded once more to 11 bits


@dataclass(frozen=True)
class Calibration:
    """K and V [L, Hkv, D] of a layer over the calibration text: what static scales and key offsets are made from."""

    k: Tensor
    v: Tensor

    def measure(self, storage: LayerSpec) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The largest magnitudes [Hkv] of K and V as stored, and the key offset [Hkv, D]; None is what has no use.

        Raises:
            ValueError: the text has fewer tokens than the layer asks for.
        """
        if not storage.needs_calibration:
            return None, None, None
        count = storage.calibration_tokens
        if count is not None and count > len(self.k):
            raise ValueError(f"evaluate: calibration on {count} tokens needs as much text, got {len(self.k)}")
        k, v = self.k[:count], self.v[:count]
        offset = estimate_k_offset(k) if storage.is_centred else None
        k_amax, v_amax = (x.abs().amax((0, 2)).float() for x in (k if offset is None else k - offset, v))
        return k_amax, v_amax, offset


@dataclass(frozen=True)
class Contestant:
    """One way of storing K and V, as it is run."""

    name: str
    spec: CacheSpec
    only: Literal["K", "V"] | None = None  # quantise one of the two
    scale_factor: float = 1.0  # the negative control reads scales that are this much too large
    num_splits: int | None = None
    query_block: int = MAX_QUERY_TOKENS  # query tokens of one decode call


def largest_code(dtype: torch.dtype) -> float:
    """The largest magnitude that a code stands for, before its scale."""
    return 127.0 if dtype == torch.int8 else float(torch.finfo(dtype).max)


def static_scale(row: KvFormat, granularity: str, amax: Tensor | None, device: torch.device) -> Tensor | None:
    """The scale that a cache is allocated with: None for dynamic scales and for formats without."""
    if not row.has_scale or granularity == "token":
        return None
    if granularity == "unit":
        return torch.ones((), device=device)
    if amax is None:
        raise ValueError(f"evaluate: granularity {granularity!r} needs calibration text, got none")
    least = torch.finfo(torch.float32).tiny * largest_code(row.dtype)
    chosen = amax if granularity == "head" else amax.max()
    return (chosen.clamp_min(least) / largest_code(row.dtype)).to(device)


class LayerCache:
    """The cache of one layer of one sequence, in pages that lie in no order."""

    def __init__(
        self,
        storage: LayerSpec,
        k: Tensor,
        capacity: int,
        calibrated: Calibration | None,
        only: str | None = None,
    ) -> None:
        pair = storage.pair
        if storage.is_centred and calibrated is None:
            raise ValueError("evaluate: a centred format needs calibration text, got none")
        self.device = k.device
        k_amax, v_amax, self.k_offset = calibrated.measure(storage) if calibrated is not None else (None, None, None)
        k_scale, v_scale = (
            static_scale(row, storage.granularity, amax, self.device)
            for row, amax in ((pair.k, k_amax), (pair.v, v_amax))
        )
        self.encoder = {
            name: (row, scale)
            for name, row, scale in (("k", pair.k, k_scale), ("v", pair.v, v_scale))
            if only == name.upper() and row.has_scale
        }
        num_pages = -(-capacity // PAGE_SIZE)
        order = torch.randperm(num_pages, dtype=torch.int32, generator=torch.Generator().manual_seed(num_pages))
        self.page_table = order[None].to(self.device)
        self.cache = KVCache.allocate(
            num_pages,
            PAGE_SIZE,
            k.shape[-2],
            k.shape[-1],
            kv_format=storage.kv_format if only is None else ABLATION_CONTAINER,
            device=self.device,
            k_scale=None if only else k_scale,
            v_scale=None if only else v_scale,
            k_offset=self.k_offset,
        )
        self.length = 0

    def append(self, k: Tensor, v: Tensor, scale_factor: float = 1.0) -> None:
        """Encodes k, v [n, Hkv, D] behind what is stored."""
        positions = torch.arange(self.length, self.length + len(k), device=self.device)
        pages, offsets = self.page_table[0, positions // PAGE_SIZE].long(), positions % PAGE_SIZE
        k, v = self._rounded("k", k), self._rounded("v", v)
        self.cache.append(k, v, pages * PAGE_SIZE + offsets)
        if scale_factor != 1.0:
            for scale in (self.cache.k_scale, self.cache.v_scale):
                if scale is not None:
                    scale[pages, offsets] *= scale_factor
        self.length += len(k)

    def _rounded(self, name: str, x: Tensor) -> Tensor:
        if name not in self.encoder:
            return x if not self.encoder else x.float()  # an append takes K and V of one dtype
        row, scale = self.encoder[name]
        offset = self.k_offset if name == "k" else None
        return dequantize_kv(*quantize_kv(x.contiguous(), row.name, scale, offset), offset=offset)

    def attend(self, q: Tensor, first_position: int, contestant: Contestant, options: AttentionOptions) -> Tensor:
        """decode_attention of q [n, Hq, D], at first_position and after, in the contestant's blocks."""
        parts = []
        for block in q.split(contestant.query_block):
            first_position += len(block)
            seq_lens = torch.tensor([first_position], dtype=torch.int32, device=self.device)
            parts.append(
                decode_attention(
                    block[None].contiguous(),
                    self.cache,
                    seq_lens=seq_lens,
                    page_table=self.page_table,
                    num_splits=contestant.num_splits,
                    **options,
                )[0]
            )
        return torch.cat(parts)

    def stored(self) -> tuple[Tensor, Tensor]:
        """K and V [length, Hkv, D] that the codes stand for, in float64, in the order of the text."""
        found = []
        for codes, scale, offset in (
            (self.cache.k, self.cache.k_scale, self.cache.k_offset),
            (self.cache.v, self.cache.v_scale, None),
        ):
            numbers = codes.double()
            if scale is not None:
                numbers = numbers * scale.double()[..., None]
            if offset is not None:
                numbers = numbers + offset.double()
            found.append(numbers[self.page_table[0].long()].flatten(0, 1)[: self.length])
        return found[0], found[1]


@dataclass
class QuantizedSequence:
    """The Attend of one sequence: a model that is called with it reads K and V from these caches alone."""

    contestant: Contestant
    num_layers: int
    capacity: int
    calibrated: list[Calibration] | None = None
    layers: dict[int, LayerCache] = field(default_factory=dict)
    last_queries: dict[int, tuple[Tensor, AttentionOptions]] = field(default_factory=dict)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, /, **options: Unpack[AttentionOptions]) -> Tensor:
        if layer not in self.layers:
            storage = self.contestant.spec.layer(layer, self.num_layers)
            calibrated = None if self.calibrated is None else self.calibrated[layer]
            self.layers[layer] = LayerCache(storage, k, self.capacity, calibrated, self.contestant.only)
        cache = self.layers[layer]
        first = cache.length
        cache.append(k[0], v[0], self.contestant.scale_factor)
        self.last_queries[layer] = (q[0, -1:], options)
        return cache.attend(q[0], first, self.contestant, options)[None]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and unfilled slots of every layer."""
        return sum(layer.cache.nbytes for layer in self.layers.values())

    @property
    def num_values(self) -> int:
        """Numbers of K and V that the model stored."""
        return sum(2 * layer.length * layer.cache.num_kv_heads * layer.cache.head_dim for layer in self.layers.values())

    def seconds_per_step(self) -> float:
        """Time of decode_attention over every layer for one new token, everything stored visible."""
        self._synchronize()
        start = time.perf_counter()
        for index, (q, options) in self.last_queries.items():
            self.layers[index].attend(q, self.layers[index].length - 1, self.contestant, options)
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if any(layer.device.type == "cuda" for layer in self.layers.values()):
            torch.cuda.synchronize()
