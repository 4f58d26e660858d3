"""Prefill and hybrid batches: their data, this library's contenders, and the check of outputs, on every device."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from reference import attention_float64
from torch import Tensor

import pyquantattn as qa

from .batch_shapes import HybridShape, PrefillShape
from .cpu_contenders import UnavailableError
from .filled_caches import FilledCaches, Scale
from .results import FRESH, MAX_KERNEL_ERROR, OURS, STATIC, Row

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST_CODES = {"int8": 127.0, "fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}
PAGE_SIZE = 16
CHECKED_TOKENS = 48  # query tokens of a sequence whose output is compared with float64


@dataclass(frozen=True)
class Place:
    """Where batches are measured, and how their inputs are rotated there."""

    device: str
    dtype: torch.dtype  # of the queries, also over a cache, and of K and V before they are stored
    num_copies: Callable[[int], int]  # of a cache of so many bytes
    num_fresh_copies: Callable[[int], int]  # of q, K and V of so many bytes


@dataclass(frozen=True)
class BatchData:
    """B sequences, one after another; the last query_counts[b] of the kv_lens[b] tokens of each are queries."""

    place: Place
    is_causal: bool
    query_counts: list[int]
    kv_lens: list[int]
    q: Tensor  # [T, Hq, D]
    k: Tensor  # [S, Hkv, D]
    v: Tensor

    @classmethod
    def random(cls, shape: PrefillShape | HybridShape, place: Place) -> BatchData:
        generator = torch.Generator(place.device).manual_seed(11)
        counts, lengths = shape.query_counts, shape.kv_lens

        def draw(num_tokens: int, num_heads: int) -> Tensor:
            sizes = (num_tokens, num_heads, shape.head_dim)
            return torch.randn(sizes, generator=generator, device=place.device, dtype=place.dtype)

        q = draw(sum(counts), shape.num_q_heads)
        k, v = (draw(sum(lengths), shape.num_kv_heads) for _ in range(2))
        return cls(place, shape.is_causal, counts, lengths, q, k, v)

    @property
    def seq_lens(self) -> Tensor:
        return torch.tensor(self.kv_lens, dtype=torch.int32, device=self.q.device)

    @property
    def cu_seqlens_q(self) -> Tensor:
        return self.cumulated(self.query_counts)

    @property
    def cu_seqlens_k(self) -> Tensor:
        return self.cumulated(self.kv_lens)

    def cumulated(self, counts: Sequence[int]) -> Tensor:
        """[B + 1] int32: where each sequence's tokens begin, then their number."""
        return torch.tensor([0, *counts]).cumsum(0).to(self.q.device, torch.int32)

    def query_slice(self, row: int) -> slice:
        first = sum(self.query_counts[:row])
        return slice(first, first + self.query_counts[row])

    def key_slice(self, row: int) -> slice:
        first = sum(self.kv_lens[:row])
        return slice(first, first + self.kv_lens[row])

    def by_sequence(self, x: Tensor) -> Tensor:
        """q, K or V as [B, L, heads, D]; the sequences must be of equal lengths."""
        return x.unflatten(0, (len(self.kv_lens), -1))


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


def require_kernel(who: str, kv_format: str | None, data: BatchData, operation: str, dtype: torch.dtype) -> None:
    head_dim = data.q.shape[-1]
    if not qa.supports(kv_format, head_dim, operation=operation, q_dtype=dtype, device=data.q.device):
        raise UnavailableError(f"{who}: this build has no kernel for {operation} with head_dim {head_dim}")


class FreshBatch(ABC):
    """q, K and V of one type, in rotated copies; what a contender does with them is its own."""

    def __init__(self, data: BatchData, dtype: torch.dtype) -> None:
        self.data = data
        first = [x.to(dtype) for x in (data.q, data.k, data.v)]
        self.cache_bytes = first[1].nbytes + first[2].nbytes
        self.num_copies = data.place.num_fresh_copies(self.cache_bytes + first[0].nbytes)
        self.copies = [first, *([x.clone() for x in first] for _ in range(self.num_copies - 1))]
        self.out = torch.empty_like(first[0])

    def copy(self, number: int) -> list[Tensor]:
        return self.copies[number % self.num_copies]

    @abstractmethod
    def call(self, copy: int) -> object: ...

    def output(self) -> Tensor:
        self.call(0)
        return self.out

    def inputs(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.copies[0]
        keys = self.data.key_slice(row)
        return q[self.data.query_slice(row)].double(), k[keys].double(), v[keys].double()


class FreshPrefill(FreshBatch):
    """prefill_attention over K and V of q's type."""

    def __init__(self, data: BatchData, dtype_name: str) -> None:
        self.name = f"{OURS}{FRESH}{dtype_name}"
        require_kernel(self.name, None, data, "prefill_attention", DTYPES[dtype_name])
        super().__init__(data, DTYPES[dtype_name])
        self.cu_seqlens = data.cu_seqlens_q

    def call(self, copy: int) -> Tensor:
        q, k, v = self.copy(copy)
        return qa.prefill_attention(q, k, v, cu_seqlens_q=self.cu_seqlens, causal=self.data.is_causal, out=self.out)


def static_scales(data: BatchData, kv_format: str) -> tuple[Tensor, Tensor]:
    """[Hkv] float32 of K and of V: their largest element gets the largest code."""
    if kv_format not in LARGEST_CODES:
        raise UnavailableError(f"{kv_format}{STATIC}: only {', '.join(LARGEST_CODES)} have scales")
    k_scale, v_scale = (x.abs().amax((0, 2)).float() / LARGEST_CODES[kv_format] for x in (data.k, data.v))
    return k_scale, v_scale


class CachedBatch(ABC):
    """The batch's queries and rotated paged caches that hold K and V; what a contender does with them is its own."""

    def __init__(self, data: BatchData, kv_format: str, static_scales: tuple[Scale, Scale] | None = None) -> None:
        self.data = data
        keys, values = (x.split(data.kv_lens) for x in (data.k, data.v))
        self.filled = FilledCaches(keys, values, PAGE_SIZE, kv_format, data.place.num_copies, static_scales)
        self.cache_bytes, self.num_copies = self.filled.nbytes, len(self.filled.caches)
        self.out = torch.empty_like(data.q)

    @abstractmethod
    def call(self, copy: int) -> object: ...

    def output(self) -> Tensor:
        self.call(0)
        return self.out

    def inputs(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.data.q[self.data.query_slice(row)].double(), *self.filled.dequantized(row)


class HybridCall(CachedBatch):
    """hybrid_attention over a paged cache: the whole batch in one call."""

    suffix = ""

    def __init__(self, data: BatchData, kv_format: str) -> None:
        self.name = f"{OURS}{kv_format}{self.suffix}"
        storage = kv_format.removesuffix(STATIC)
        require_kernel(self.name, storage, data, "hybrid_attention", data.q.dtype)
        super().__init__(data, storage, None if storage == kv_format else static_scales(data, storage))
        self.lengths = {"cu_seqlens_q": data.cu_seqlens_q, "seq_lens": data.seq_lens}

    def call(self, copy: int) -> object:
        lengths = self.lengths | {"page_table": self.filled.page_table}
        cache, causal = self.filled.cache(copy), self.data.is_causal
        return qa.hybrid_attention(self.data.q, cache, **lengths, causal=causal, out=self.out)


@dataclass(frozen=True)
class Part:
    """The sequences of a batch that prefill, or those that decode, for a call of their own."""

    sequences: list[int]
    rows: Tensor  # of the batch's queries
    q: Tensor
    out: Tensor

    @classmethod
    def of(cls, data: BatchData, *, is_prefill: bool) -> Part | None:
        """None if there are no such sequences."""
        sequences = [b for b, count in enumerate(data.query_counts) if (count > 1) is is_prefill]
        if not sequences:
            return None
        tokens = torch.arange(len(data.q), device=data.q.device)
        rows = torch.cat([tokens[data.query_slice(b)] for b in sequences])
        return cls(sequences, rows, data.q[rows], torch.empty_like(data.q[rows]))


class SeparateCalls(HybridCall):
    """The same rows in two calls: one for the sequences that prefill, then decode_attention for the others."""

    suffix = " separate"

    def __init__(self, data: BatchData, kv_format: str) -> None:
        super().__init__(data, kv_format)
        self.prefill, self.decode = (Part.of(data, is_prefill=is_prefill) for is_prefill in (True, False))
        self.prefill_lengths, self.decode_lengths = (self._lengths(part) for part in (self.prefill, self.decode))
        if self.prefill:
            counts = [data.query_counts[b] for b in self.prefill.sequences]
            self.prefill_lengths["cu_seqlens_q"] = data.cumulated(counts)

    def _lengths(self, part: Part | None) -> dict[str, Tensor]:
        if part is None:
            return {}
        assert self.filled.page_table is not None
        return {
            "seq_lens": self.lengths["seq_lens"][part.sequences],
            "page_table": self.filled.page_table[part.sequences],
        }

    def call(self, copy: int) -> object:
        cache = self.filled.cache(copy)
        if part := self.prefill:
            qa.hybrid_attention(part.q, cache, **self.prefill_lengths, out=part.out)
        if part := self.decode:
            qa.decode_attention(part.q, cache, **self.decode_lengths, out=part.out)

    def output(self) -> Tensor:
        self.call(0)
        for part in filter(None, (self.prefill, self.decode)):
            self.out[part.rows] = part.out
        return self.out


def ours(
    data: BatchData, shape: PrefillShape | HybridShape, kv_formats: Sequence[str]
) -> dict[str, Callable[[], BatchContender]]:
    """This library's contenders by name, not yet built: hybrid batches in one call and in separate ones."""
    found: dict[str, Callable[[], BatchContender]] = {}
    for name in kv_formats:
        is_fresh = name.startswith(FRESH)
        make = partial(FreshPrefill, data, name.removeprefix(FRESH)) if is_fresh else partial(HybridCall, data, name)
        found[f"{OURS}{name}"] = make
        if isinstance(shape, HybridShape):
            found[f"{OURS}{name} separate"] = partial(SeparateCalls, data, name)
    return found


def facts(data: BatchData, contender: BatchContender) -> Row:
    """What is known of a contender besides its time."""
    return {
        "cache_bytes": contender.cache_bytes,
        "relative_error": float(f"{relative_error(data, contender):.2e}"),
        "max_error": float(f"{error_bound(contender):.2e}"),
    }


def relative_error(data: BatchData, contender: BatchContender) -> float:
    """Relative L2 distance of the output to float64 attention over what the contender was given.

    Of the first and the last sequence, at query tokens spread over each, its first and last ones included.
    """
    out, error, norm = contender.output().double(), 0.0, 0.0
    for row in sorted({0, len(data.query_counts) - 1}):
        q, k, v = contender.inputs(row)
        tokens = torch.linspace(0, len(q) - 1, min(len(q), CHECKED_TOKENS)).round().long().to(q.device)
        positions = tokens + len(k) - len(q) if data.is_causal else torch.full_like(tokens, len(k) - 1)
        expected = attention_float64(q[tokens], k, v, positions)[0]
        error += float((out[data.query_slice(row)][tokens] - expected).square().sum())
        norm += float(expected.square().sum())
    return math.sqrt(error / norm)


def error_bound(contender: BatchContender) -> float:
    """The kernels' bound, and the rounding of a 16-bit output."""
    rounding = {"bf16": 2.0**-8, "fp16": 2.0**-11}
    return MAX_KERNEL_ERROR + (rounding.get(contender.name.split()[-1], 0.0) if FRESH in contender.name else 0.0)
