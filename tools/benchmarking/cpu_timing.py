"""Timing on a CPU: interleaved turns over rotated caches, and the rates that everything is judged by."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROTATED_L3_SIZES = 3  # rotated copies hold this many times the L3, so that none is cached when its turn comes
SETTLE_SECONDS = 0.008  # longer than the interval at which the system accounts the time of running threads
MAX_SETTLE_SECONDS = 0.2
MAX_COPIES = 256  # a step of less than half a megabyte is found in the L3
READ_BYTES = 512 << 20
LONG_CALL_MILLISECONDS = 100.0  # from here on, what waking the threads costs does not show
MULTIPLIED_SIZE = 1536  # rows and columns of the matrices whose product's rate is measured


def l3_bytes() -> int:
    """Size of the last-level cache of CPU 0, or 32 MiB where the system does not say."""
    sizes = []
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes, default=32 << 20)


def num_copies(bytes_per_step: int) -> int:
    """How many copies of a step's cache to rotate."""
    return max(1, min(MAX_COPIES, -(-ROTATED_L3_SIZES * l3_bytes() // max(1, bytes_per_step))))


def pin(num_threads: int) -> None:
    """Restricts the calling thread, and the threads it starts from now on, to the first `num_threads` cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(_CORES)[:num_threads])
    torch.set_num_threads(num_threads)


_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def settle() -> None:
    """Waits until this process's threads sleep: idle ones of OpenMP spin for about 8 ms, onnxruntime's for about 40."""
    for _ in range(round(MAX_SETTLE_SECONDS / SETTLE_SECONDS)):
        before = time.process_time()
        time.sleep(SETTLE_SECONDS)
        if time.process_time() - before < SETTLE_SECONDS / 8:
            return


class OtherLoad:
    """Share of the cores that other processes took while this was running: a disturbed run must be seen."""

    def __init__(self) -> None:
        self.wall = self.others = 0.0

    def __enter__(self) -> None:
        self.start = self._sample()

    def __exit__(self, *_: object) -> None:
        wall, busy, own = (now - before for now, before in zip(self._sample(), self.start, strict=True))
        self.wall += wall
        self.others += busy - own

    @staticmethod
    def _sample() -> tuple[float, float, float]:
        """Seconds: wall, busy of all cores, busy of this process; without Linux's /proc nobody else is seen."""
        stat, own = Path("/proc/stat"), os.times()
        if not stat.exists():
            return time.monotonic(), own.user + own.system, own.user + own.system
        user, nice, system = (int(field) for field in stat.read_text().split(maxsplit=4)[1:4])
        return time.monotonic(), (user + nice + system) / os.sysconf("SC_CLK_TCK"), own.user + own.system

    def percent(self) -> float:
        return max(0.0, 100 * self.others / (max(self.wall, 1e-9) * (os.cpu_count() or 1)))


def interleaved_milliseconds(
    calls: Sequence[Callable[[int], object]],
    rounds: int,
    turn_seconds: float = 0.02,
    other_load: OtherLoad | None = None,
) -> list[list[float]]:
    """Times contenders turn by turn (A B C A B C ...): for each, the median call of every turn, in milliseconds.

    `calls[c](i)` runs contender c on its i-th rotated copy. A turn waits until all threads sleep, makes one call
    that is not counted to wake this contender's own, then times single calls until `turn_seconds` have passed. A long
    call is a turn by itself.
    """
    turns: list[list[float]] = [[] for _ in calls]
    step = [0] * len(calls)
    for _ in range(rounds):
        for contender, call in enumerate(calls):
            settle()
            with other_load or OtherLoad():
                waking = _milliseconds(call, step[contender])
                is_long = waking >= LONG_CALL_MILLISECONDS
                samples = [waking] if is_long else []
                while not is_long and (len(samples) < 3 or sum(samples) < turn_seconds * 1e3):
                    step[contender] += 1
                    samples.append(_milliseconds(call, step[contender]))
            turns[contender].append(statistics.median(samples))
    return turns


def _milliseconds(call: Callable[[int], object], copy: int) -> float:
    start = time.perf_counter_ns()
    call(copy)
    return (time.perf_counter_ns() - start) / 1e6


def read_bandwidth(num_threads: int) -> dict[str, float]:
    """GB/s of programs that only read memory, by name; the largest is the ceiling.

    libc's memchr for a byte that does not occur and memcmp of equal buffers are vectorised loops that load and compare;
    torch sums 64-bit integers. ctypes releases the GIL, so slices run in parallel.
    """
    libc = ctypes.CDLL(None)
    for function in (libc.memchr, libc.memcmp):
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    libc.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    data = torch.full((READ_BYTES // 8,), 0x0101010101010101, dtype=torch.int64)
    base, part = data.data_ptr(), READ_BYTES // num_threads
    half = part // 2

    def memchr(thread: int) -> None:
        libc.memchr(base + thread * part, 0xFE, part)

    def memcmp(thread: int) -> None:
        libc.memcmp(base + thread * part, base + thread * part + half, half)

    with ThreadPoolExecutor(num_threads) as pool:
        readers: dict[str, Callable[[int], object]] = {
            "memchr": lambda _: list(pool.map(memchr, range(num_threads))),
            "memcmp": lambda _: list(pool.map(memcmp, range(num_threads))),
            "torch sum": lambda _: data.sum(),
        }
        turns = interleaved_milliseconds(list(readers.values()), rounds=5)
    return {name: READ_BYTES / min(medians) / 1e6 for name, medians in zip(readers, turns, strict=True)}


def matrix_rate() -> dict[str, float]:
    """GFLOP/s of programs that only multiply float32 matrices, by name; the largest stands for the FMA units' peak.

    Blocked products reach 85 to 95 % of it.
    """
    a, b = (torch.randn(MULTIPLIED_SIZE, MULTIPLIED_SIZE) for _ in range(2))
    out, numpy_out = torch.empty_like(a), np.empty((MULTIPLIED_SIZE, MULTIPLIED_SIZE), np.float32)
    multipliers: dict[str, Callable[[int], object]] = {
        "torch mm": lambda _: torch.mm(a, b, out=out),
        "numpy matmul": lambda _: np.matmul(a.numpy(), b.numpy(), out=numpy_out),
    }
    turns = interleaved_milliseconds(list(multipliers.values()), rounds=3, turn_seconds=0.1)
    flop = 2 * MULTIPLIED_SIZE**3
    return {name: flop / min(medians) / 1e6 for name, medians in zip(multipliers, turns, strict=True)}


def call_overhead_microseconds(call: Callable[[], object], calls: int = 3000) -> float:
    """Time of an eager call whose kernel has next to nothing to do."""
    for _ in range(200):
        call()
    rounds = []
    for _ in range(7):
        start = time.perf_counter_ns()
        for _ in range(calls // 7):
            call()
        rounds.append((time.perf_counter_ns() - start) / (calls // 7) / 1e3)
    return statistics.median(rounds)
