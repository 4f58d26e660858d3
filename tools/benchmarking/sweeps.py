"""Five sweeps over length, batch size and prefill fraction: their shapes, their CSV and their charts."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cuda_shapes
from .batch_shapes import HybridShape, PrefillShape, at_every_fraction
from .cpu_shapes import DecodeShape
from .results import OURS, Results, Row

CSV_COLUMNS = ("milliseconds", "gigaflop_per_second", "gigabytes_per_second", "relative_error", "failure")


@dataclass(frozen=True)
class Sweep:
    """Shapes that differ in one size. The name is the set that its rows belong to."""

    name: str
    operation: str  # decode, prefill or hybrid
    axis: str  # the size that changes, a field of the shapes
    shapes: tuple[Any, ...]  # of the device's kinds

    @property
    def title(self) -> str:
        return f"{self.operation.capitalize()} over {self.axis.replace('_', ' ')}"


def _five(prompts: Sequence[Sequence[Any]], steps: Sequence[Sequence[Any]], hybrid: HybridShape) -> list[Sweep]:
    """prompts and steps: the shapes over length, then those over batch size."""
    return [
        Sweep("prefill-length", "prefill", "length", tuple(prompts[0])),
        Sweep("prefill-batch", "prefill", "batch_size", tuple(prompts[1])),
        Sweep("decode-length", "decode", "kv_len", tuple(steps[0])),
        Sweep("decode-batch", "decode", "batch_size", tuple(steps[1])),
        Sweep("hybrid-fraction", "hybrid", "prefill_percent", tuple(at_every_fraction(hybrid))),
    ]


def sweeps(is_quick: bool = False) -> list[Sweep]:
    """The five of a CPU; quick ones have sizes that say nothing of speed, for a first look and for tests."""
    heads = (2, 1, 64) if is_quick else (32, 8, 128)
    lengths = (16, 48) if is_quick else (256, 512, 1024, 2048, 4096)
    kv_lengths = (16, 48) if is_quick else (512, 1024, 2048, 4096, 8192, 16384, 32768)
    batches = (1, 3) if is_quick else (1, 2, 4, 8, 16)
    prompt, context = (16, 32) if is_quick else (512, 2048)
    return _five(
        [[PrefillShape(1, *heads, n) for n in lengths], [PrefillShape(b, *heads, prompt) for b in batches]],
        [[DecodeShape(1, *heads, n) for n in kv_lengths], [DecodeShape(b, *heads, context) for b in batches]],
        HybridShape(4, *heads, 32, 8, 0) if is_quick else HybridShape(8, *heads, 2048, 256, 0),
    )


def cuda_sweeps(is_quick: bool = False) -> list[Sweep]:
    """The five of a GPU."""
    heads = (32, 8, 128)
    lengths = (256, 512) if is_quick else (256, 512, 1024, 2048, 4096, 8192, 16384)
    kv_lengths = (512, 1024) if is_quick else (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    prompt_batches = (1, 2) if is_quick else (1, 2, 4, 8, 16, 32)
    batches = (1, 2) if is_quick else (1, 2, 4, 8, 16, 32, 64, 128)
    prompt, context = 1024, 4096

    def step(batch_size: int, kv_len: int) -> cuda_shapes.DecodeShape:
        return cuda_shapes.DecodeShape("decode", batch_size, kv_len, *heads)

    return _five(
        [[PrefillShape(1, *heads, n) for n in lengths], [PrefillShape(b, *heads, prompt) for b in prompt_batches]],
        [[step(1, n) for n in kv_lengths], [step(b, context) for b in batches]],
        HybridShape(4, *heads, 512, 64, 0) if is_quick else HybridShape(32, *heads, 4096, 128, 0),
    )


def _rows(content: dict[str, Any], sweep: Sweep) -> list[Row]:
    """A sweep's rows at the largest thread count, a later run's in the place of an earlier one's."""
    results = Results(content, sweep.name)
    threads = max(results.threads())
    return [row for row in results.rows.values() if row.get("threads", 0) == threads]


def _table(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for sweep in sweeps():
        for row in _rows(content, sweep):
            about = {"sweep": sweep.name, "axis": sweep.axis, "value": row["sizes"][sweep.axis]}
            about |= {"threads": row.get("threads", ""), "contender": row["contender"]}
            yield about | {name: row.get(name, "") for name in CSV_COLUMNS}


def write_csv(content: dict[str, Any], path: Path) -> None:
    """One line for each measurement of every sweep."""
    with path.open("w", newline="") as file:
        columns = ("sweep", "axis", "value", "threads", "contender", *CSV_COLUMNS)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_table(content))


def plot(content: dict[str, Any], path: Path) -> None:
    """A panel for each sweep: prefill as GFLOP/s, the others as milliseconds; this library's lines are solid."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [(sweep, rows) for sweep in sweeps() if (rows := [r for r in _rows(content, sweep) if "failure" not in r])]
    figure, axes = pyplot.subplots(2, 3, figsize=(18, 11))
    for panel, (sweep, rows) in zip(axes.flat, found, strict=False):
        measure = "gigaflop_per_second" if sweep.operation == "prefill" else "milliseconds"
        for contender in dict.fromkeys(row["contender"] for row in rows):
            points = sorted((r["sizes"][sweep.axis], r[measure]) for r in rows if r["contender"] == contender)
            is_plain = contender.startswith(OURS) and not contender.endswith("separate")
            panel.plot(*zip(*points, strict=True), "o-" if is_plain else "x--", label=contender.removeprefix(OURS))
        if sweep.operation != "hybrid":
            panel.set_xscale("log", base=2)
        panel.set_yscale("linear" if sweep.operation == "prefill" else "log")
        panel.set(title=sweep.title, xlabel=sweep.axis, ylabel=measure.replace("_", " "))
        panel.legend(fontsize=7)
    for panel in axes.flat[len(found) :]:
        panel.set_visible(False)
    run, threads = content["runs"][-1], found[0][1][0].get("threads", 0) if found else 0
    where = run.get("gpu", f"{threads} thread(s)")
    figure.suptitle(f"{where}. Solid: pyquantattn over a cache or fresh K and V; dashed: peers, separate calls")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
