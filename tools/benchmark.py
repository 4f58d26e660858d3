#!/usr/bin/env python3
"""Measures decode attention against the memory floor and against other libraries, in one run on one device.

python tools/benchmark.py                                   the shapes of docs/performance.md, 1 and 2 threads
python tools/benchmark.py --quick                           two shapes, for a first look
python tools/benchmark.py --shapes 1:32:8:128:4096 --formats int8 --peers torch --threads 2
python tools/benchmark.py --shapes lengths --save benchmarks/cpu-zen4.json --append
python tools/benchmark.py --render docs/performance.md      rewrites its tables from the results files they name
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarking import cpu_shapes, report
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_FORMATS = ["int8", "fp8_e4m3", "fp8_e5m2", "fp16", "bf16"]
MAX_OTHER_LOAD = 3.0  # percent of all cores
console = Console()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sets = ", ".join(cpu_shapes.SETS)
    parser.add_argument("--quick", action="store_true", help="two shapes and fewer rounds")
    parser.add_argument(
        "--shapes",
        default="models",
        help=f"comma-separated: {sets}, or batch:q_heads:kv_heads:head_dim:kv_len[:page_size]",
    )
    parser.add_argument("--formats", default=",".join(DEFAULT_FORMATS), help="comma-separated kv_format names")
    parser.add_argument("--threads", default="1,2", help="comma-separated thread counts")
    parser.add_argument("--peers", default="torch,onnxruntime,ggml", help="comma-separated; '' for none")
    parser.add_argument(
        "--ggml", type=Path, default=os.environ.get("GGML_LIBRARY_DIR"), help="folder of a built libggml"
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="turns of each contender; the published time is their median"
    )
    parser.add_argument("--save", type=Path, help="results file (JSON); a plot is written beside it")
    parser.add_argument(
        "--append", action="store_true", help="add this run to the results file instead of replacing it"
    )
    parser.add_argument(
        "--render", type=Path, metavar="DOCUMENT", help="rewrite the marked tables of a document and stop"
    )
    return parser.parse_args()


def show(rows: list[dict[str, Any]]) -> None:
    """One table per shape and thread count."""
    first = rows[0]
    columns = ("contender", "ms", "of floor", "GB/s", "% of read", "error")
    title = f"{first['shape']}, {first['threads']} thread(s)"
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in sorted(rows, key=lambda row: row.get("milliseconds", float("inf"))):
        if "failure" in row:
            table.add_row(row["contender"], "-", "-", "-", "-", row["failure"], style="dim")
            continue
        ratio = row["milliseconds"] / row["floor_milliseconds"]
        table.add_row(
            row["contender"], f"{row['milliseconds']:.3f}", f"{ratio:.2f}x", f"{row['gigabytes_per_second']:.1f}",
            f"{row['percent_of_read_bandwidth']:.0f}", f"{row['relative_error']:.1e}",
            style="bold" if row["contender"].startswith(report.OURS) else None,
        )  # fmt: skip
    console.print(table)
    if (load := rows[-1].get("other_load_percent", 0)) > MAX_OTHER_LOAD:
        console.print(f"other processes took {load} % of the cores: these times are not to be trusted", style="red")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The run's description, limits and rows."""
    from benchmarking import cpu_suite, environment

    names = [name for name in arguments.peers.split(",") if name]
    if unknown := set(names) - set(cpu_suite.PEERS):
        raise ValueError(
            f"--peers: a peer must be one of {', '.join(cpu_suite.PEERS)}, got {', '.join(sorted(unknown))}"
        )
    if "ggml" in names and arguments.ggml is None:
        console.print("ggml is left out: --ggml DIR names the folder of a built libggml", style="dim")
    options = cpu_suite.Options(
        kv_formats=arguments.formats.split(","),
        peers=names,
        threads=[int(count) for count in arguments.threads.split(",")],
        rounds=3 if arguments.quick else arguments.rounds,
        ggml=arguments.ggml,
    )
    shapes = cpu_shapes.QUICK if arguments.quick else cpu_shapes.parse_shapes(arguments.shapes)
    description, rows = environment.describe_run(), []

    def keep(new: list[dict[str, Any]]) -> None:
        rows.extend(new)
        show(new)

    limits = cpu_suite.run(shapes, options, keep)
    console.print(limits)
    return description | limits | {"rows": rows}


def save(path: Path, run: dict[str, Any], is_appended: bool) -> None:
    earlier = json.loads(path.read_text())["runs"] if is_appended and path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"runs": [*earlier, run]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    results = report.Results(content)
    labels = [shape.label for shape in cpu_shapes.MODELS]
    shapes = [shape for shape in results.shapes() if shape in labels] or results.shapes()[:6]
    report.plot(results, path.with_suffix(".png"), shapes)
    console.print(f"wrote {path} and {path.with_suffix('.png')}")


def restart_with_huge_pages() -> None:
    """Runs this program again with huge pages for large buffers, which glibc reads before anything starts.

    numpy asks for them, torch and ggml do not: with small pages the floor and all contenders but onnxruntime would be
    measured at two thirds of the memory's speed, or not, as fragmentation has it.
    """
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in os.environ.get("GLIBC_TUNABLES", ""):
        tunables = [os.environ.get("GLIBC_TUNABLES", ""), "glibc.malloc.hugetlb=1"]
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, tunables))
        os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> int:
    arguments = parse_arguments()
    if arguments.render is not None:
        console.print(f"{arguments.render}: {report.render_document(arguments.render, ROOT)} tables")
        return 0
    restart_with_huge_pages()
    from benchmarking import cpu_suite

    try:
        run = measure(arguments)
    except ValueError as error:
        console.print(f"benchmark: {error}", style="red", markup=False)
        return 2
    if arguments.save is not None:
        save(arguments.save, run, arguments.append)
    failures = cpu_suite.broken_checks(run["rows"])
    for failure in failures:
        console.print(f"WRONG OUTPUT {failure}", style="bold red", markup=False)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
