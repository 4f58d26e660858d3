"""Our cache for one decode step on a CUDA device."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from reference import attention_float64, stored_tokens

import pyquantattn as qa

from . import cuda_timing
from .cuda_shapes import DecodeShape
from .lengths import batch_lengths


class CacheCase:
    """Random codes and scales, shuffled pages, copies rotated past the L2."""

    def __init__(self, shape: DecodeShape, kv_format: str) -> None:
        self.shape = shape
        lengths = torch.tensor(batch_lengths(shape.batch_size, shape.kv_len, shape.cv), dtype=torch.int32)
        pages = (-(-lengths // shape.page_size)).tolist()
        num_pages = sum(pages)
        order = torch.randperm(num_pages, dtype=torch.int32, generator=torch.Generator().manual_seed(3))
        page_table = torch.zeros(shape.batch_size, max(pages), dtype=torch.int32)
        for row, (own, count) in enumerate(zip(order.split(pages), pages, strict=True)):
            page_table[row, :count] = own
        self.page_table, self.seq_lens = page_table.cuda(), lengths.cuda()
        tokens = int(lengths.sum())
        self.bytes_per_step = self._new_cache(kv_format, 1).nbytes * tokens // shape.page_size
        self.caches = [
            self._new_cache(kv_format, num_pages) for _ in range(cuda_timing.num_copies(self.bytes_per_step))
        ]
        q_shape = (shape.batch_size, shape.num_q_tokens, shape.num_q_heads, shape.head_dim)
        self.q = torch.randn(q_shape, device="cuda", dtype=torch.float16)
        self.out = torch.empty_like(self.q)

    def _new_cache(self, name: str, num_pages: int) -> qa.KVCache:
        shape = self.shape
        kv_format, _, granularity = name.partition(" ")
        # Codes are drawn with this deviation, so that values have one of about 1.
        sigma = {"int8": 73.0, "fp8_e4m3": 64.0, "fp8_e5m2": 64.0}.get(kv_format, 1.0)
        static = (
            torch.linspace(0.8, 1.2, shape.num_kv_heads, device="cuda") / sigma if granularity == "static" else None
        )
        cache = qa.KVCache.allocate(
            num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim, kv_format=kv_format, device="cuda",
            k_scale=static, v_scale=static,
        )  # fmt: skip
        for codes, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
            if codes.dtype == torch.int8:
                codes.random_(-127, 128)
            else:
                for page in codes.split(1 << 12):
                    page.copy_(torch.randn(page.shape, device="cuda", dtype=torch.float16).mul_(sigma))
            if scale is not None and static is None:
                scale.copy_((0.8 + 0.4 * torch.rand(scale.shape, device="cuda")) / sigma)
        return cache

    def calls(self) -> list[Callable[[], torch.Tensor]]:
        return [partial(self.run, cache) for cache in self.caches]

    def run(self, cache: qa.KVCache) -> torch.Tensor:
        return qa.decode_attention(self.q, cache, seq_lens=self.seq_lens, page_table=self.page_table, out=self.out)

    def relative_error(self) -> float:
        """Relative L2 distance to float64 attention over the dequantised cache, on up to five sequences."""
        out = self.run(self.caches[0])
        error = norm = 0.0
        for row in range(0, self.shape.batch_size, max(1, self.shape.batch_size // 4)):
            length = int(self.seq_lens[row])
            pages = self.page_table[row, : -(-length // self.shape.page_size)].long()
            expected = attention_float64(self.q[row], *stored_tokens(self.caches[0], pages, length))[0]
            error += float((out[row].double() - expected).square().sum())
            norm += float(expected.square().sum())
        return math.sqrt(error / norm)
