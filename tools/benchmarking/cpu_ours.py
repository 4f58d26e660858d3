"""This library as a contender of the CPU benchmark."""

from __future__ import annotations

import torch
from reference import stored_tokens
from torch import Tensor

import pyquantattn as qa

from .cpu_contenders import StepData, UnavailableError
from .cpu_timing import num_copies


class PyQuantAttn:
    """Caches of one format, filled by append; pages of a paged cache are shuffled."""

    def __init__(self, data: StepData, kv_format: str) -> None:
        shape = data.shape
        if not qa.supports(kv_format=kv_format, head_dim=shape.head_dim, device="cpu"):
            raise UnavailableError(f"pyquantattn {kv_format}: this build has no kernel for head_dim {shape.head_dim}")
        self.name, self.data = f"pyquantattn {kv_format}", data
        self.page_size = shape.page_size or int(data.seq_lens.max())
        self.page_table, num_pages = self._pages()
        first = qa.KVCache.allocate(num_pages, self.page_size, shape.num_kv_heads, shape.head_dim, kv_format=kv_format)
        self.caches = [first]
        self._fill(first)
        self.cache_bytes = first.nbytes * int(data.seq_lens.sum()) // (num_pages * self.page_size)
        for _ in range(num_copies(self.cache_bytes) - 1):
            self.caches.append(self._copy(first))
        self.out = torch.empty_like(data.q)

    def _pages(self) -> tuple[Tensor, int]:
        """[B, max_pages] int32 and the number of pages: each sequence owns the pages it needs, in shuffled order."""
        counts = (-(-self.data.seq_lens // self.page_size)).tolist()
        order = torch.randperm(sum(counts), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for row, pages in enumerate(order.split(counts)):
            table[row, : len(pages)] = pages
        if self.data.shape.page_size is None:  # one page per sequence, in order
            table = torch.arange(len(counts), dtype=torch.int32)[:, None]
        return table, sum(counts)

    def _fill(self, cache: qa.KVCache) -> None:
        for row, length in enumerate(self.data.seq_lens.tolist()):
            tokens = torch.arange(length)
            slots = self.page_table[row, tokens // self.page_size].long() * self.page_size + tokens % self.page_size
            cache.append(self.data.k[row, :length], self.data.v[row, :length], slots)

    def _copy(self, cache: qa.KVCache) -> qa.KVCache:
        scales = (None if scale is None else scale.clone() for scale in (cache.k_scale, cache.v_scale))
        return qa.KVCache.from_tensors(cache.k.clone(), cache.v.clone(), *scales, layout=cache.layout)

    def call(self, copy: int) -> Tensor:
        table = None if self.data.shape.page_size is None else self.page_table
        cache = self.caches[copy % len(self.caches)]
        return qa.decode_attention(self.data.q, cache, seq_lens=self.data.seq_lens, page_table=table, out=self.out)

    def output(self) -> Tensor:
        return self.call(0)

    def dequantized(self, row: int) -> tuple[Tensor, Tensor]:
        length = int(self.data.seq_lens[row])
        pages = self.page_table[row, : -(-length // self.page_size)].long()
        return stored_tokens(self.caches[0], pages, length)


def call_overhead_cache() -> PyQuantAttn:
    """A step over one token of one head, whose kernel takes next to no time."""
    from .cpu_shapes import DecodeShape

    return PyQuantAttn(StepData.random(DecodeShape(1, 1, 1, 64, 1)), "int8")
