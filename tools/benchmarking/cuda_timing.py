"""Timing on a CUDA device: replays of a graph that holds many calls over rotated inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

# Rotated inputs must not fit in the L2 cache (50 to 60 MB on Hopper), or a replay would measure the cache.
MIN_ROTATED_BYTES = 256 << 20
MAX_COPIES = 64


def num_copies(bytes_per_step: int) -> int:
    """How many copies of a step's inputs to rotate, so that none is in the L2 cache when its turn comes."""
    return max(2, min(MAX_COPIES, -(-MIN_ROTATED_BYTES // max(1, bytes_per_step))))


def microseconds_per_call(calls: Sequence[Callable[[], object]], budget_ms: float = 60.0) -> float:
    """Median time of one call, in microseconds.

    `calls` are the same operation over different inputs. They are captured in one CUDA graph, so host overhead and
    launch gaps that a serving engine's graph would not have are not counted.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    replay_ms = _replay_ms(graph)
    samples = [_replay_ms(graph) for _ in range(max(5, min(200, int(budget_ms / max(replay_ms, 1e-3)))))]
    return statistics.median(samples) / len(calls) * 1e3


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def read_floor() -> tuple[float, float]:
    """(fixed microseconds, bytes per microsecond) of a kernel that only reads, from a small and a large read."""
    small, large = 16 << 20, 1 << 30
    small_us, large_us = _read_us(small), _read_us(large)
    rate = (large - small) / (large_us - small_us)
    return max(0.0, small_us - small / rate), rate


def _read_us(num_bytes: int) -> float:
    from .cuda_read_kernel import BLOCK, read_words

    words = num_bytes // 4
    copies = [torch.randint(1 << 20, (words,), dtype=torch.int32, device="cuda") for _ in range(num_copies(num_bytes))]
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")

    def launch(source: torch.Tensor, warps: int) -> None:
        read_words[(words // BLOCK,)](source, sink, BLOCK, num_warps=warps)

    return min(microseconds_per_call([partial(launch, source, warps) for source in copies]) for warps in (4, 8, 16))


def host_microseconds_per_call(call: Callable[[], object], calls: int = 2000) -> float:
    """Host time that an eager call takes before it returns; the device must be the faster side, so use a tiny shape."""
    for _ in range(100):
        call()
    torch.cuda.synchronize()
    rounds = []
    for _ in range(7):
        start = time.perf_counter_ns()
        for _ in range(calls // 7):
            call()
        rounds.append((time.perf_counter_ns() - start) / (calls // 7) / 1e3)
        torch.cuda.synchronize()
    return statistics.median(rounds)
