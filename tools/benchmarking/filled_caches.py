"""Caches of this library that hold a benchmark's K and V."""

from __future__ import annotations

import torch
from reference import stored_tokens
from torch import Tensor

import pyquantattn as qa

from .cpu_timing import num_copies


class FilledCaches:
    """Rotated copies of a cache of one format, filled by append; pages are shuffled.

    k, v [B, L, Hkv, D] float32, of which sequence b has seq_lens[b] tokens. page_size None: contiguous.
    """

    def __init__(self, k: Tensor, v: Tensor, seq_lens: Tensor, page_size: int | None, kv_format: str) -> None:
        self.seq_lens, self.page_size = seq_lens, page_size or int(seq_lens.max())
        self.pages, num_pages = self._pages(is_paged=page_size is not None)
        self.page_table = None if page_size is None else self.pages
        first = qa.KVCache.allocate(num_pages, self.page_size, *k.shape[2:], kv_format=kv_format)
        for row, length in enumerate(seq_lens.tolist()):
            first.append(k[row, :length], v[row, :length], self._slots(row, length))
        self.nbytes = first.nbytes * int(seq_lens.sum()) // (num_pages * self.page_size)
        self.caches = [first, *(self._copy(first) for _ in range(num_copies(self.nbytes) - 1))]

    def _pages(self, is_paged: bool) -> tuple[Tensor, int]:
        """[B, max_pages] int32 and the number of pages: each sequence owns the pages it needs."""
        counts = (-(-self.seq_lens // self.page_size)).tolist()
        if not is_paged:
            return torch.arange(len(counts), dtype=torch.int32)[:, None], len(counts)
        order = torch.randperm(sum(counts), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for row, pages in enumerate(order.split(counts)):
            table[row, : len(pages)] = pages
        return table, sum(counts)

    def _slots(self, row: int, length: int) -> Tensor:
        tokens = torch.arange(length)
        return self.pages[row, tokens // self.page_size].long() * self.page_size + tokens % self.page_size

    @staticmethod
    def _copy(cache: qa.KVCache) -> qa.KVCache:
        scales = (None if scale is None else scale.clone() for scale in (cache.k_scale, cache.v_scale))
        return qa.KVCache.from_tensors(cache.k.clone(), cache.v.clone(), *scales, layout=cache.layout)

    def cache(self, copy: int) -> qa.KVCache:
        return self.caches[copy % len(self.caches)]

    def dequantized(self, row: int) -> tuple[Tensor, Tensor]:
        """K and V [kv_len, Hkv, D] of one sequence as its codes and scales define them, float64."""
        length = int(self.seq_lens[row])
        return stored_tokens(self.caches[0], self.pages[row, : -(-length // self.page_size)].long(), length)
