"""Decode on a CUDA device: this library and its peers on the same shapes in one run, checked against float64."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

import pyquantattn as qa

from . import cuda_peers, cuda_timing
from .cuda_shapes import DecodeShape


def lengths_of(shape: DecodeShape) -> torch.Tensor:
    """[B] int32 lengths; ragged ones are log-normal, rescaled so that the batch has the uniform batch's total."""
    if not shape.cv:
        return torch.full((shape.batch_size,), shape.kv_len, dtype=torch.int32)
    generator = torch.Generator().manual_seed(7)
    sigma = math.sqrt(math.log1p(shape.cv**2))
    weights = torch.exp(sigma * torch.randn(shape.batch_size, generator=generator, dtype=torch.float64))
    lengths = (weights / weights.sum() * shape.kv_len * shape.batch_size).round().clamp(min=1)
    return lengths.to(torch.int32)


class CacheCase:
    """Our cache for one shape and format: random codes and scales, shuffled pages, copies rotated past the L2."""

    def __init__(self, shape: DecodeShape, kv_format: str, q_dtype: torch.dtype = torch.float16) -> None:
        self.shape = shape
        lengths = lengths_of(shape)
        pages = (-(-lengths // shape.page_size)).tolist()
        self.num_pages = sum(pages)
        self.seq_lens = lengths.cuda()
        order = torch.randperm(self.num_pages, dtype=torch.int32, generator=torch.Generator().manual_seed(3))
        self.page_table = torch.zeros(shape.batch_size, max(pages), dtype=torch.int32)
        first = 0
        for row, count in enumerate(pages):
            self.page_table[row, :count] = order[first : first + count]
            first += count
        self.page_table = self.page_table.cuda()
        probe = self._new_cache(kv_format, 1)
        per_page = probe.nbytes
        tokens = int(lengths.sum())
        self.bytes_per_step = per_page * tokens // shape.page_size
        self.caches = [
            self._new_cache(kv_format, self.num_pages) for _ in range(cuda_timing.num_copies(self.bytes_per_step))
        ]
        q_shape = (shape.batch_size, shape.num_q_tokens, shape.num_q_heads, shape.head_dim)
        self.q = torch.randn(q_shape, device="cuda").to(q_dtype)
        self.out = torch.empty_like(self.q)

    def _new_cache(self, kv_format: str, num_pages: int) -> qa.KVCache:
        shape = self.shape
        cache = qa.KVCache.allocate(
            num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim, kv_format=kv_format, device="cuda"
        )
        for codes, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
            if codes.dtype == torch.int8:
                codes.random_(-127, 128)
                sigma = 127 / math.sqrt(3)
            else:
                sigma = 1.0 if scale is None else 64.0
                for page in codes.split(1 << 14):
                    page.copy_(torch.randn(page.shape, device="cuda", dtype=torch.float16).mul_(sigma))
            if scale is not None:
                scale.copy_((0.8 + 0.4 * torch.rand(scale.shape, device="cuda")) / sigma)
        return cache

    def calls(self) -> list[Callable[[], torch.Tensor]]:
        return [partial(self.run, cache) for cache in self.caches]

    def run(self, cache: qa.KVCache) -> torch.Tensor:
        return qa.decode_attention(self.q, cache, seq_lens=self.seq_lens, page_table=self.page_table, out=self.out)

    def relative_error(self) -> float:
        """Relative L2 distance to float64 attention over the dequantised cache, on up to four sequences."""
        out = self.run(self.caches[0]).double()
        error = norm = 0.0
        for row in range(0, self.shape.batch_size, max(1, self.shape.batch_size // 4)):
            length = int(self.seq_lens[row])
            expected = self._reference(row, length)
            error += float((out[row] - expected).square().sum())
            norm += float(expected.square().sum())
        return math.sqrt(error / norm)

    def _reference(self, row: int, length: int) -> torch.Tensor:
        shape, cache = self.shape, self.caches[0]
        pages = self.page_table[row, : -(-length // shape.page_size)].long()
        k, v = (
            (codes[pages].double() if scale is None else codes[pages].double() * scale[pages][..., None].double())
            .flatten(0, 1)[:length]
            .repeat_interleave(shape.num_q_heads // shape.num_kv_heads, dim=1)
            for codes, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
        )
        scores = torch.einsum("nhd,lhd->nhl", self.q[row].double(), k) / math.sqrt(shape.head_dim)
        position = length - shape.num_q_tokens + torch.arange(shape.num_q_tokens, device="cuda")
        hidden = torch.arange(length, device="cuda")[None] > position[:, None]
        scores.masked_fill_(hidden[:, None], -math.inf)
        return torch.einsum("nhl,lhd->nhd", scores.softmax(-1), v)


def _row(
    shape: DecodeShape, kernel: str, us: float, num_bytes: int, floor: tuple[float, float], error: float
) -> dict[str, Any]:
    fixed_us, rate = floor
    return {
        "shape": shape.label,
        "kernel": kernel,
        "microseconds": round(us, 2),
        "cache_bytes": num_bytes,
        "floor_microseconds": round(fixed_us + num_bytes / rate, 2),
        "percent_of_read_bandwidth": round(100 * num_bytes / rate / us, 1),
        "relative_error": float(f"{error:.2e}"),
    }


def measure_ours(shape: DecodeShape, kv_format: str, floor: tuple[float, float]) -> dict[str, Any]:
    """One row for this library: time, bytes, error against float64, and the kernel that ran."""
    case = CacheCase(shape, kv_format)
    us = cuda_timing.microseconds_per_call(case.calls())
    row = _row(shape, f"pyquantattn {kv_format}", us, case.bytes_per_step, floor, case.relative_error())
    row["variant"] = qa.last_kernel().variant
    return row


def measure_peer(shape: DecodeShape, peer: cuda_peers.Peer, floor: tuple[float, float]) -> dict[str, Any]:
    """One row for a peer over uniform lengths; a peer that refuses the shape gives a row with its message."""
    num_bytes = 2 * shape.batch_size * shape.kv_len * shape.num_kv_heads * shape.head_dim * peer.kv_dtype.itemsize
    kv_shape = (shape.batch_size, shape.kv_len, shape.num_kv_heads, shape.head_dim)
    try:
        steps = []
        q = torch.randn(shape.batch_size, shape.num_q_heads, shape.head_dim, device="cuda", dtype=torch.float16)
        for _ in range(cuda_timing.num_copies(num_bytes)):
            k, v = (torch.randn(kv_shape, device="cuda", dtype=torch.float16).to(peer.kv_dtype) for _ in range(2))
            steps.append(cuda_peers.Step(q, k, v, peer.page_size))
        calls = peer.make(steps)
        error = _peer_error(steps[0], calls[0]())
        us = cuda_timing.microseconds_per_call(calls)
    except Exception as failure:  # a peer's own limits are a result, whatever it raises
        return {"shape": shape.label, "kernel": peer.name, "failure": f"{type(failure).__name__}: {str(failure)[:200]}"}
    return _row(shape, peer.name, us, num_bytes, floor, error)


def _peer_error(step: cuda_peers.Step, out: torch.Tensor) -> float:
    group = step.q.shape[1] // step.k.shape[2]
    k, v = (x[0].double().repeat_interleave(group, dim=1) for x in (step.k, step.v))
    weights = (torch.einsum("hd,lhd->hl", step.q[0].double(), k) / math.sqrt(step.q.shape[2])).softmax(-1)
    expected = torch.einsum("hl,lhd->hd", weights, v)
    return float((out[0].double() - expected).norm() / expected.norm())


def run(
    shapes: Iterable[DecodeShape],
    kv_formats: list[str],
    peers: list[cuda_peers.Peer],
    report: Callable[[dict[str, Any]], None],
) -> tuple[float, float]:
    """Measures every shape with every format and peer; `report` gets each row as it is made. Returns the read floor."""
    floor = cuda_timing.read_floor()
    for shape in shapes:
        for kv_format in kv_formats:
            report(measure_ours(shape, kv_format, floor))
            _release()
        if shape.cv or shape.num_q_tokens != 1:
            continue  # peers are measured on uniform single-token batches
        for peer in peers:
            report(measure_peer(shape, peer, floor))
            _release()
    return floor


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def host_overhead_microseconds() -> float:
    """Host time of an eager decode call on a shape whose kernel is shorter than the call."""
    case = CacheCase(DecodeShape("tiny", 1, 16, 8, 8, head_dim=64), "int8")
    return cuda_timing.host_microseconds_per_call(lambda: case.run(case.caches[0]))


def append_rows(floor: tuple[float, float]) -> list[dict[str, Any]]:
    """Append of one decode step's tokens: bytes are the rows read and the codes and scales written."""
    rows = []
    for tokens, kv_format in ((64, "int8"), (64, "fp8_e4m3"), (8192, "int8"), (8192, "fp8_e4m3"), (8192, "fp16")):
        heads, head_dim, page_size = 8, 128, 16
        pages = -(-tokens // page_size)
        caches = [
            qa.KVCache.allocate(pages, page_size, heads, head_dim, kv_format=kv_format, device="cuda")
            for _ in range(cuda_timing.num_copies(tokens * heads * head_dim * 6))
        ]
        k, v = (torch.randn(tokens, heads, head_dim, device="cuda", dtype=torch.float16) for _ in range(2))
        inputs = [(k.clone(), v.clone()) for _ in caches]
        slots = torch.randperm(tokens, device="cuda")
        calls = [partial(cache.append, k, v, slots) for cache, (k, v) in zip(caches, inputs, strict=True)]
        us = cuda_timing.microseconds_per_call(calls)
        num_bytes = caches[0].nbytes * tokens // (pages * page_size) + k.nbytes + v.nbytes
        fixed_us, rate = floor
        rows.append(
            {
                "operation": f"append {tokens} tokens, {heads} heads, {kv_format}",
                "microseconds": round(us, 2),
                "bytes": num_bytes,
                "floor_microseconds": round(fixed_us + num_bytes / rate, 2),
            }
        )
        _release()
    return rows
