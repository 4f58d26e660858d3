"""A CPU benchmark: this library and its peers on the same shapes in the same run, interleaved, outputs checked."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from . import cpu_timing
from .cpu_contenders import UnavailableError
from .cpu_ours import call_overhead_cache
from .cpu_shapes import DecodeShape
from .cpu_workloads import Options, Shape, workload_of
from .results import Row


class Ceilings:
    """The best rates seen in a run, by thread count and program: GB/s read, GFLOP/s of float32 matrix products.

    They are measured before every shape, since other tenants of a machine change them; the highest of the run judges
    all of its rows.
    """

    def __init__(self) -> None:
        self.read: dict[int, dict[str, float]] = {}
        self.multiply: dict[int, dict[str, float]] = {}

    def measure(self, num_threads: int, shape: Shape) -> None:
        is_decode = isinstance(shape, DecodeShape)
        rates = cpu_timing.read_bandwidth(num_threads) if is_decode else cpu_timing.matrix_rate()
        best = (self.read if is_decode else self.multiply).setdefault(num_threads, {})
        for program, rate in rates.items():
            best[program] = max(rate, best.get(program, 0.0))

    def judge(self, rows: Iterable[Row], num_threads: int) -> None:
        """Adds what rows mean against the ceilings."""
        for row in rows:
            if "failure" in row:
                continue
            if "flop" in row:
                ceiling = max(self.multiply[num_threads].values())
                rate = row["flop"] / row["milliseconds"] / 1e6
                row["gigaflop_per_second"] = round(rate, 2)
                row["percent_of_matrix_rate"] = round(100 * rate / ceiling, 1)
                continue
            ceiling = max(self.read[num_threads].values())
            rate = row["cache_bytes"] / row["milliseconds"] / 1e6
            row["floor_milliseconds"] = round(row["cache_bytes"] / ceiling / 1e6, 4)
            row["gigabytes_per_second"] = round(rate, 2)
            row["percent_of_read_bandwidth"] = round(100 * rate / ceiling, 1)

    def limits(self) -> dict[str, Any]:
        """What a run says of the machine."""
        rates = {
            "read_bandwidth_gigabytes_per_second": self.read,
            "matrix_rate_gigaflop_per_second": self.multiply,
        }
        return {
            name: {str(n): {program: round(rate, 1) for program, rate in best.items()} for n, best in found.items()}
            for name, found in rates.items()
        }


@dataclass(frozen=True)
class Job:
    """A shape to measure and what takes part."""

    shape: Shape
    options: Options
    sweep: str = ""  # the set that the rows belong to, if not the one that the shape is known by


def measure_shape(job: Job, num_threads: int) -> list[Row]:
    """One row per contender; one that cannot run gives a row that says why."""
    workload = workload_of(job.shape, job.options, num_threads)
    about: Row = {"shape": job.shape.label, "sizes": asdict(job.shape), "threads": num_threads} | workload.about
    about["set"] = job.sweep or about["set"]
    contenders: list[Any] = []
    rows: list[Row] = []
    for name, construct in workload.contenders.items():
        try:
            contenders.append(construct())
        except UnavailableError as reason:
            rows.append(about | {"contender": name, "failure": str(reason)})
    facts = [workload.facts(contender) for contender in contenders]
    other_load = cpu_timing.OtherLoad()
    turns = cpu_timing.interleaved_milliseconds(
        [contender.call for contender in contenders], job.options.rounds, other_load=other_load
    )
    about["other_load_percent"] = round(other_load.percent(), 1)
    for contender, found, medians in zip(contenders, facts, turns, strict=True):
        measured = {
            "contender": contender.name,
            "milliseconds": round(statistics.median(medians), 4),
            "fastest_turn": round(min(medians), 4),
            "slowest_turn": round(max(medians), 4),
        }
        rows.append(about | measured | found)
    return rows


def run(jobs: Sequence[Job], threads: list[int], report: Callable[[list[Row], Row], None]) -> dict[str, Any]:
    """Does every job with every thread count; `report` gets the rows of each and the limits so far. Returns the run's
    own limits."""
    ceilings, overhead = Ceilings(), 0.0

    def limits() -> dict[str, Any]:
        return ceilings.limits() | {"eager_call_microseconds": round(overhead, 2)}

    for num_threads in sorted(threads):  # ascending: threads inherit the cores of the thread that starts them
        cpu_timing.pin(num_threads)
        if not overhead:
            tiny = call_overhead_cache()
            overhead = cpu_timing.call_overhead_microseconds(partial(tiny.call, 0))
        all_rows: list[Row] = []
        for job in jobs:
            ceilings.measure(num_threads, job.shape)
            rows = measure_shape(job, num_threads)
            all_rows += rows
            ceilings.judge(all_rows, num_threads)
            report(rows, limits())
            gc.collect()
    return limits()
