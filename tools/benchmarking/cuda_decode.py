"""Decode on a CUDA device: this library and its peers on the same shapes in one run, checked against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from reference import attention_float64

import pyquantattn as qa

from . import cuda_peers, cuda_timing
from .cuda_cache import CacheCase
from .cuda_contenders import Options, attempt, release
from .cuda_shapes import DecodeShape
from .results import Row


def _measured(us: float, num_bytes: int, floor: tuple[float, float], error: float) -> Row:
    """What a row says of a measurement against a floor of (fixed us, bytes per us)."""
    fixed_us, rate = floor
    return {
        "milliseconds": round(us / 1e3, 6),
        "cache_bytes": num_bytes,
        "floor_milliseconds": round((fixed_us + num_bytes / rate) / 1e3, 6),
        "gigabytes_per_second": round(num_bytes / us / 1e3, 1),
        "percent_of_read_bandwidth": round(100 * num_bytes / rate / us, 1),
        "relative_error": float(f"{error:.2e}"),
    }


def _measure_ours(shape: DecodeShape, kv_format: str, floor: tuple[float, float]) -> Row:
    case = CacheCase(shape, kv_format)
    us = cuda_timing.microseconds_per_call(case.calls())
    row = _measured(us, case.bytes_per_step, floor, case.relative_error())
    return row | {"variant": qa.last_kernel().variant}


def _measure_peer(shape: DecodeShape, peer: cuda_peers.Peer, floor: tuple[float, float]) -> Row:
    num_bytes = 2 * shape.batch_size * shape.kv_len * shape.num_kv_heads * shape.head_dim * peer.kv_dtype.itemsize
    kv_shape = (shape.batch_size, shape.kv_len, shape.num_kv_heads, shape.head_dim)
    q = torch.randn(shape.batch_size, shape.num_q_heads, shape.head_dim, device="cuda", dtype=torch.float16)
    num_pages = shape.batch_size * shape.kv_len // peer.page_size
    order = torch.randperm(num_pages, device="cuda") if peer.is_paged else torch.arange(num_pages, device="cuda")
    order = order.to(torch.int32).view(shape.batch_size, -1)
    steps = []
    for _ in range(cuda_timing.num_copies(num_bytes)):
        k, v = (torch.empty(kv_shape, device="cuda", dtype=peer.kv_dtype) for _ in range(2))
        for tensor in (k, v):
            for part in tensor.view(-1, shape.num_kv_heads, shape.head_dim).split(1 << 18):
                part.copy_(torch.randn(part.shape, device="cuda", dtype=torch.float16))
        steps.append(cuda_peers.Step(q, k, v, peer.page_size, order))
    calls = peer.make(steps)
    out, error, norm = calls[0](), 0.0, 0.0
    for b in range(0, shape.batch_size, max(1, shape.batch_size // 4)):
        expected = attention_float64(q[b][None], *steps[0].values(b))[0][0]
        error += float((out[b].double() - expected).square().sum())
        norm += float(expected.square().sum())
    return _measured(cuda_timing.microseconds_per_call(calls), num_bytes, floor, math.sqrt(error / norm))


def measure_shape(shape: DecodeShape, options: Options, floor: tuple[float, float]) -> list[Row]:
    """One row per contender; one that cannot run gives a row that says why."""
    measures: dict[str, Callable[[], Row]] = {
        f"pyquantattn {name}": partial(_measure_ours, shape, name, floor) for name in options.kv_formats
    }
    if not shape.cv and shape.num_q_tokens == 1:  # peers get uniform batches of single tokens
        for peer in cuda_peers.peers_for(shape, options.peers):
            measures[peer.name] = partial(_measure_peer, shape, peer, floor)
    about = {"shape": shape.label, "sizes": asdict(shape)}
    rows = []
    for name, measure in measures.items():
        rows.append(about | {"contender": name} | attempt(measure))
        release()
    return rows


def eager_microseconds() -> dict[str, float]:
    """Host time of an eager decode call on a shape whose kernel is shorter than the call, and of two calls of torch:
    machines differ, so the ratios say more."""
    shape = DecodeShape("tiny", 1, 16, 8, 8, head_dim=64)
    case = CacheCase(shape, "int8")
    q = torch.randn(1, shape.num_q_heads, 1, shape.head_dim, device="cuda", dtype=torch.float16)
    k = torch.randn(1, shape.num_kv_heads, shape.kv_len, shape.head_dim, device="cuda", dtype=torch.float16)
    calls: dict[str, Callable[[], object]] = {
        "decode_attention": lambda: case.run(case.caches[0]),
        "torch add_": lambda: q.add_(1),
        "torch scaled_dot_product_attention": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k),
    }
    return {name: round(cuda_timing.host_microseconds_per_call(call), 2) for name, call in calls.items()}


def append_rows(floor: tuple[float, float]) -> list[Row]:
    """Append of one decode step's tokens or of a prompt's. Bytes: the rows read, the codes and scales written."""
    rows = []
    heads, head_dim, page_size = 8, 128, 16
    for tokens, kv_format in ((64, "int8"), (64, "fp8_e4m3"), (8192, "int8"), (8192, "fp8_e4m3"), (8192, "fp16")):
        pages = -(-tokens // page_size)
        copies = range(cuda_timing.num_copies(tokens * heads * head_dim * 6))
        caches = [
            qa.KVCache.allocate(pages, page_size, heads, head_dim, kv_format=kv_format, device="cuda") for _ in copies
        ]
        inputs = [
            [torch.randn(tokens, heads, head_dim, device="cuda", dtype=torch.float16) for _ in range(2)] for _ in copies
        ]
        slots = torch.randperm(tokens, device="cuda")
        calls = [partial(cache.append, k, v, slots) for cache, (k, v) in zip(caches, inputs, strict=True)]
        us = cuda_timing.microseconds_per_call(calls)
        num_bytes = caches[0].nbytes * tokens // (pages * page_size) + sum(tensor.nbytes for tensor in inputs[0])
        rows.append(
            {
                "operation": f"append {tokens} tokens, {heads} heads, D={head_dim}, {kv_format}",
                "microseconds": round(us, 2),
                "bytes": num_bytes,
                "floor_microseconds": round(floor[0] + num_bytes / floor[1], 2),
            }
        )
    return rows
