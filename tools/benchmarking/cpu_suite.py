"""Decode on a CPU: this library and its peers on the same shapes in the same run, interleaved, outputs checked."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from . import cpu_timing
from .cpu_contenders import Contender, StepData, UnavailableError, relative_error
from .cpu_ggml import GgmlFlashAttention
from .cpu_onnxruntime import OnnxRuntimeGqa
from .cpu_ours import PyQuantAttn, call_overhead_cache
from .cpu_shapes import DecodeShape, set_of
from .cpu_torch import TorchSdpa

PEERS = ("torch", "onnxruntime", "ggml")

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    kv_formats: list[str]
    peers: list[str]
    threads: list[int]
    rounds: int
    ggml: Path | None = None  # folder of a built libggml


def _constructors(data: StepData, options: Options, num_threads: int) -> dict[str, Callable[[], Contender]]:
    """Everything to measure on one shape, by name, not yet built."""
    found: dict[str, Callable[[], Contender]] = {}
    for kv_format in options.kv_formats:
        found[f"pyquantattn {kv_format}"] = partial(PyQuantAttn, data, kv_format)
    if data.shape.cv:
        return found  # the peers take batches of equal lengths, or pad to the longest
    if data.shape.page_size is not None:  # none of the peers has paged caches: they get contiguous ones
        data = replace(data, shape=replace(data.shape, page_size=None))
    if "torch" in options.peers:
        for dtype in ("fp32", "bf16"):
            found[f"torch {dtype}"] = partial(TorchSdpa, data, dtype, is_grouped=False)
            if data.shape.group_size > 1:
                found[f"torch {dtype} grouped"] = partial(TorchSdpa, data, dtype, is_grouped=True)
    if "onnxruntime" in options.peers:
        for name in ("fp32", "int8 per tensor", "int8 per channel"):
            found[f"onnxruntime {name}"] = partial(OnnxRuntimeGqa, data, name, num_threads)
    if "ggml" in options.peers and options.ggml is not None:
        for name in ("f16", "q8_0"):
            found[f"ggml {name}"] = partial(GgmlFlashAttention, data, name, num_threads, options.ggml)
    return found


def measure_shape(shape: DecodeShape, num_threads: int, options: Options) -> list[Row]:
    """One row per contender; one that cannot run gives a row that says why."""
    data = StepData.random(shape)
    about: Row = {
        "shape": shape.label,
        "sizes": asdict(shape),
        "set": set_of(shape),
        "threads": num_threads,
    }
    contenders: list[Contender] = []
    rows: list[Row] = []
    for name, construct in _constructors(data, options, num_threads).items():
        try:
            contenders.append(construct())
        except UnavailableError as reason:
            rows.append(about | {"contender": name, "failure": str(reason)})
    errors = [relative_error(data, contender) for contender in contenders]
    other_load = cpu_timing.OtherLoad()
    turns = cpu_timing.interleaved_milliseconds(
        [contender.call for contender in contenders], options.rounds, other_load=other_load
    )
    about["other_load_percent"] = round(other_load.percent(), 1)
    for contender, error, medians in zip(contenders, errors, turns, strict=True):
        measured = {
            "contender": contender.name,
            "milliseconds": round(statistics.median(medians), 4),
            "fastest_turn": round(min(medians), 4),
            "slowest_turn": round(max(medians), 4),
            "cache_bytes": contender.cache_bytes,
            "relative_error": float(f"{error:.2e}"),
        }
        rows.append(about | measured)
    return rows


def judge(rows: Iterable[Row], ceiling: float) -> None:
    """Adds what rows mean against a read bandwidth of `ceiling` GB/s."""
    for row in rows:
        if "failure" in row:
            continue
        gigabytes_per_second = row["cache_bytes"] / row["milliseconds"] / 1e6
        row["floor_milliseconds"] = round(row["cache_bytes"] / ceiling / 1e6, 4)
        row["gigabytes_per_second"] = round(gigabytes_per_second, 2)
        row["percent_of_read_bandwidth"] = round(100 * gigabytes_per_second / ceiling, 1)


def run(shapes: Iterable[DecodeShape], options: Options, report: Callable[[list[Row], Row], None]) -> dict[str, Any]:
    """Measures every shape with every thread count; `report` gets the rows of each and the limits so
    far. Returns the run's own limits.

    The read bandwidth is measured before every shape, since other tenants of a machine change it; the highest of the
    run judges all of its rows.
    """
    bandwidth: dict[int, dict[str, float]] = {}
    overhead, shapes = None, list(shapes)
    for num_threads in sorted(options.threads):  # ascending: threads inherit the cores of the thread that starts them
        cpu_timing.pin(num_threads)
        best, all_rows = bandwidth.setdefault(num_threads, {}), []
        if overhead is None:
            tiny = call_overhead_cache()
            overhead = cpu_timing.call_overhead_microseconds(partial(tiny.call, 0))
        for shape in shapes:
            for program, rate in cpu_timing.read_bandwidth(num_threads).items():
                best[program] = max(rate, best.get(program, 0.0))
            rows = measure_shape(shape, num_threads, options)
            all_rows += rows
            judge(all_rows, max(best.values()))
            report(rows, _limits(bandwidth, overhead))
            gc.collect()
    return _limits(bandwidth, overhead)


def _limits(bandwidth: dict[int, dict[str, float]], overhead: float | None) -> dict[str, Any]:
    """What a run says of the machine."""
    return {
        "read_bandwidth_gigabytes_per_second": {
            str(n): {program: round(rate, 1) for program, rate in best.items()} for n, best in bandwidth.items()
        },
        "eager_call_microseconds": round(overhead or 0.0, 2),
    }
