"""Prefill and hybrid batches: their data, this library's and torch's contenders, and the check of their outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from reference import attention_float64
from torch import Tensor
from torch.nn import functional as F

import pyquantattn as qa

from .batch_shapes import HybridShape, PrefillShape
from .cpu_contenders import UnavailableError
from .filled_caches import FilledCaches

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FRESH = "fresh "  # before the name of a type: K and V as the model computed them, no cache
PAGE_SIZE = 16
CHECKED_TOKENS = 48  # query tokens of a sequence whose output is compared with float64


@dataclass(frozen=True)
class BatchData:
    """B sequences of L tokens whose last query_counts[b] tokens are queries; float32 throughout."""

    query_counts: list[int]
    q: Tensor  # [T, Hq, D]
    k: Tensor  # [B, L, Hkv, D]
    v: Tensor

    @classmethod
    def random(cls, shape: PrefillShape | HybridShape) -> BatchData:
        generator = torch.Generator().manual_seed(11)
        if isinstance(shape, PrefillShape):
            counts, length = [shape.length] * shape.batch_size, shape.length
        else:
            counts, length = shape.query_counts, shape.kv_len
        q = torch.randn(sum(counts), shape.num_q_heads, shape.head_dim, generator=generator)
        kv_shape = (shape.batch_size, length, shape.num_kv_heads, shape.head_dim)
        k, v = (torch.randn(kv_shape, generator=generator) for _ in range(2))
        return cls(counts, q, k, v)

    @property
    def seq_lens(self) -> Tensor:
        return torch.full((self.k.shape[0],), self.k.shape[1], dtype=torch.int32)

    def query_slice(self, row: int) -> slice:
        first = sum(self.query_counts[:row])
        return slice(first, first + self.query_counts[row])


class BatchContender(Protocol):
    """One library with one type of K and V, ready to run the batch."""

    name: str
    cache_bytes: int  # of K and V, with scales

    def call(self, copy: int) -> object:
        """Runs the batch over rotated copy `copy` (any number; taken modulo the number of copies)."""

    def output(self) -> Tensor:
        """[T, Hq, D]."""

    def inputs(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """q [n, Hq, D], K and V [L, Hkv, D] of one sequence as this contender was given them, float64."""


def cumulated(counts: list[int]) -> Tensor:
    """[B + 1] int32: where each sequence's query tokens begin, then their number."""
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def require_kernel(who: str, kv_format: str | None, data: BatchData, operation: str, dtype: torch.dtype) -> None:
    head_dim = data.q.shape[-1]
    if not qa.supports(kv_format, head_dim, operation=operation, q_dtype=dtype, device=data.q.device):
        raise UnavailableError(f"{who}: this build has no kernel for head_dim {head_dim}")


class FreshPrefill:
    """prefill_attention over K and V of q's type."""

    def __init__(self, data: BatchData, dtype_name: str) -> None:
        self.name, self.data = f"pyquantattn {FRESH}{dtype_name}", data
        require_kernel(self.name, None, data, "prefill_attention", DTYPES[dtype_name])
        self.q, self.k, self.v = (
            x.to(DTYPES[dtype_name]).contiguous() for x in (data.q, data.k.flatten(0, 1), data.v.flatten(0, 1))
        )
        self.cache_bytes = self.k.nbytes + self.v.nbytes
        self.cu_seqlens = cumulated(data.query_counts)
        self.out = torch.empty_like(self.q)

    def call(self, copy: int) -> Tensor:
        return qa.prefill_attention(self.q, self.k, self.v, cu_seqlens_q=self.cu_seqlens, out=self.out)

    def output(self) -> Tensor:
        return self.call(0)

    def inputs(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        part = self.data.query_slice(row)
        return self.q[part].double(), self.k[part].double(), self.v[part].double()


class HybridCall:
    """hybrid_attention over a paged cache: the whole batch in one call."""

    suffix = ""

    def __init__(self, data: BatchData, kv_format: str) -> None:
        self.name, self.data = f"pyquantattn {kv_format}{self.suffix}", data
        require_kernel(self.name, kv_format, data, "hybrid_attention", torch.float32)
        self.filled = FilledCaches(data.k, data.v, data.seq_lens, PAGE_SIZE, kv_format)
        self.cache_bytes = self.filled.nbytes
        self.cu_seqlens, self.seq_lens = cumulated(data.query_counts), data.seq_lens
        self.out = torch.empty_like(data.q)

    def call(self, copy: int) -> object:
        lengths = {"cu_seqlens_q": self.cu_seqlens, "seq_lens": self.seq_lens, "page_table": self.filled.page_table}
        return qa.hybrid_attention(self.data.q, self.filled.cache(copy), **lengths, out=self.out)

    def output(self) -> Tensor:
        self.call(0)
        return self.out

    def inputs(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.data.q[self.data.query_slice(row)].double(), *self.filled.dequantized(row)


@dataclass(frozen=True)
class Part:
    """Some sequences of a batch, for a call of their own."""

    rows: Tensor  # of the batch's queries
    q: Tensor
    out: Tensor
    lengths: dict[str, Tensor]  # seq_lens and page_table


class SeparateCalls(HybridCall):
    """The same rows in two calls: one for the sequences that prefill, then decode_attention for the others."""

    suffix = " separate"

    def __init__(self, data: BatchData, kv_format: str) -> None:
        super().__init__(data, kv_format)
        groups = {many: [b for b, n in enumerate(data.query_counts) if (n > 1) is many] for many in (True, False)}
        self.prefill, self.decode = (self._part(groups[many]) for many in (True, False))
        self.prefill_cu_seqlens = cumulated([data.query_counts[b] for b in groups[True]])

    def _part(self, group: list[int]) -> Part | None:
        if not group:
            return None
        assert self.filled.page_table is not None
        rows = torch.cat([torch.arange(len(self.data.q))[self.data.query_slice(b)] for b in group])
        q = self.data.q[rows]
        lengths = {"seq_lens": self.seq_lens[group], "page_table": self.filled.page_table[group]}
        return Part(rows, q, torch.empty_like(q), lengths)

    def call(self, copy: int) -> object:
        cache = self.filled.cache(copy)
        if part := self.prefill:
            qa.hybrid_attention(part.q, cache, cu_seqlens_q=self.prefill_cu_seqlens, **part.lengths, out=part.out)
        if part := self.decode:
            qa.decode_attention(part.q, cache, **part.lengths, out=part.out)

    def output(self) -> Tensor:
        self.call(0)
        for part in filter(None, (self.prefill, self.decode)):
            self.out[part.rows] = part.out
        return self.out


class TorchCausalSdpa:
    """scaled_dot_product_attention(is_causal=True), q [B, Hq, L, D], K and V [B, Hkv, L, D], as models call it."""

    def __init__(self, data: BatchData, dtype_name: str) -> None:
        self.name = f"torch {dtype_name}"
        batch_size = data.k.shape[0]
        tensors = (data.q.unflatten(0, (batch_size, -1)), data.k, data.v)
        self.q, self.k, self.v = (x.transpose(1, 2).to(DTYPES[dtype_name]).contiguous() for x in tensors)
        self.cache_bytes = self.k.nbytes + self.v.nbytes
        self.is_grouped = self.q.shape[1] != self.k.shape[1]

    def call(self, copy: int) -> Tensor:
        return F.scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, enable_gqa=self.is_grouped)

    def output(self) -> Tensor:
        return self.call(0).transpose(1, 2).flatten(0, 1)

    def inputs(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x[row].transpose(0, 1).double() for x in (self.q, self.k, self.v))
        return q, k, v


def relative_error(data: BatchData, contender: BatchContender) -> float:
    """Relative L2 distance of the output to float64 attention over what the contender was given.

    Of the first and the last sequence, at query tokens spread over each, its first and last ones included.
    """
    out, error, norm = contender.output().double(), 0.0, 0.0
    for row in sorted({0, len(data.query_counts) - 1}):
        q, k, v = contender.inputs(row)
        tokens = torch.linspace(0, len(q) - 1, min(len(q), CHECKED_TOKENS)).round().long()
        positions = tokens + len(k) - len(q)
        expected = attention_float64(q[tokens], k, v, positions)[0]
        error += float((out[data.query_slice(row)][tokens] - expected).square().sum())
        norm += float(expected.square().sum())
    return math.sqrt(error / norm)


def error_bound(contender: BatchContender, kernel_error: float) -> float:
    """The kernels' bound, and the rounding of a 16-bit output."""
    rounding = {"bf16": 2.0**-8, "fp16": 2.0**-11}
    return kernel_error + (rounding.get(contender.name.split()[-1], 0.0) if FRESH in contender.name else 0.0)
