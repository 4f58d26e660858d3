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
MULTIPLIED_SIZE = 8192  # rows and columns of the matrices whose product's rate is measured


def num_copies(bytes_per_step: int) -> int:
    """How many copies of a step's inputs to rotate, so that none is in the L2 cache when its turn comes."""
    return max(2, min(MAX_COPIES, -(-MIN_ROTATED_BYTES // max(1, bytes_per_step))))


class Replay:
    """A CUDA graph of `calls`, the same operation over different inputs, replayed to be timed.

    In a graph, host overhead and launch gaps that a serving engine's graph would not have are not counted.
    """

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph, self.num_calls = torch.cuda.CUDAGraph(), len(calls)
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()

    def milliseconds(self) -> float:
        """Of all calls, once."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def interleaved_microseconds(replays: Sequence[Replay], budget_ms: float = 60.0) -> list[list[float]]:
    """Times replays in turn (A B C A B C ...): for each, the microseconds of one of its calls in every round.

    So a device whose clock falls as it warms slows all contenders down alike. The slowest one gets about `budget_ms`.
    """
    longest = max((replay.milliseconds() for replay in replays), default=0.0)
    rounds = max(5, min(200, int(budget_ms / max(longest, 1e-3))))
    turns: list[list[float]] = [[] for _ in replays]
    for _ in range(rounds):
        for turn, replay in zip(turns, replays, strict=True):
            turn.append(replay.milliseconds() / replay.num_calls * 1e3)
    return turns


def microseconds_per_call(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one call, in microseconds."""
    return statistics.median(interleaved_microseconds([Replay(calls)])[0])


def matrix_rate() -> dict[str, float]:
    """GFLOP/s of products of large 16-bit matrices, by type; the largest stands for what tensor cores sustain."""
    rates = {}
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(MULTIPLIED_SIZE, MULTIPLIED_SIZE, device="cuda", dtype=dtype) for _ in range(2))
        us = microseconds_per_call([partial(torch.mm, a, b, out=torch.empty_like(a)) for _ in range(2)])
        rates[f"torch mm {name}"] = 2 * MULTIPLIED_SIZE**3 / us / 1e3
    return rates


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
