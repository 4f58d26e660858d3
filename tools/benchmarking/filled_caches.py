"""Caches of this library that hold a benchmark's K and V."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from reference import stored_tokens
from torch import Tensor

import pyquantattn as qa

Scale = float | Tensor


class FilledCaches:
    """Rotated copies of a cache of one format, filled by append; pages are shuffled.

    keys, values: [L, Hkv, D] of each sequence. page_size None: contiguous. num_copies: how many copies a cache of so
    many bytes has. static_scales: of K and of V, one for all elements or one for each KV head; None for dynamic ones.
    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        page_size: int | None,
        kv_format: str,
        num_copies: Callable[[int], int],
        static_scales: tuple[Scale, Scale] | None = None,
    ) -> None:
        self.lengths, device = [len(x) for x in keys], keys[0].device
        self.page_size = page_size or max(self.lengths)
        pages, num_pages = self._pages(is_paged=page_size is not None)
        self.pages = pages.to(device)
        self.page_table = None if page_size is None else self.pages
        sizes = (num_pages, self.page_size, *keys[0].shape[1:])
        k_scale, v_scale = static_scales or (None, None)
        first = qa.KVCache.allocate(*sizes, kv_format=kv_format, device=device, k_scale=k_scale, v_scale=v_scale)
        for row, (k, v) in enumerate(zip(keys, values, strict=True)):
            first.append(k, v, self._slots(row))
        self.nbytes = first.nbytes * sum(self.lengths) // (num_pages * self.page_size)
        self.caches = [first, *(self._copy(first) for _ in range(num_copies(self.nbytes) - 1))]

    @property
    def page_counts(self) -> list[int]:
        """Pages of each sequence."""
        return [-(-length // self.page_size) for length in self.lengths]

    def _pages(self, is_paged: bool) -> tuple[Tensor, int]:
        """[B, max_pages] int32 and the number of pages: each sequence owns the pages it needs."""
        counts = self.page_counts
        if not is_paged:
            return torch.arange(len(counts), dtype=torch.int32)[:, None], len(counts)
        order = torch.randperm(sum(counts), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for row, pages in enumerate(order.split(counts)):
            table[row, : len(pages)] = pages
        return table, sum(counts)

    def _slots(self, row: int) -> Tensor:
        tokens = torch.arange(self.lengths[row], device=self.pages.device)
        return self.pages[row, tokens // self.page_size].long() * self.page_size + tokens % self.page_size

    @staticmethod
    def _copy(cache: qa.KVCache) -> qa.KVCache:
        scales = (None if scale is None else scale.clone() for scale in (cache.k_scale, cache.v_scale))
        return qa.KVCache.from_tensors(cache.k.clone(), cache.v.clone(), *scales, layout=cache.layout)

    def cache(self, copy: int) -> qa.KVCache:
        return self.caches[copy % len(self.caches)]

    def dequantized(self, row: int) -> tuple[Tensor, Tensor]:
        """K and V [L, Hkv, D] of one sequence as its codes and scales define them, float64."""
        pages = self.pages[row, : self.page_counts[row]].long()
        return stored_tokens(self.caches[0], pages, self.lengths[row])
