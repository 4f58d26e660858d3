#!/usr/bin/env python3
"""Measures attention against the machine's limits and against other libraries, in one run on one device.

python tools/benchmark.py                                   what docs/performance.md shows, on a GPU if there is one
python tools/benchmark.py --device cpu --threads 1,2        the same on the CPU
python tools/benchmark.py --quick                           two shapes, for a first look
python tools/benchmark.py --operation prefill               prompts, fresh and over caches; hybrid: mixed batches
python tools/benchmark.py --operation generate              steps of a whole transformers model, on every cache
python tools/benchmark.py --operation sweeps --save benchmarks/sweeps.json
                                                            five sweeps, also as CSV and charts beside the file
python tools/benchmark.py --shapes 1:32:8:128:4096 --formats int8 --peers torch --threads 2
python tools/benchmark.py --shapes lengths --save benchmarks/cpu-zen4.json --append
python tools/benchmark.py --render docs/performance.md      rewrites its tables from the results files they name
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarking import batch_shapes, cpu_shapes, cuda_shapes, generate_models, report
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
OPERATIONS = ("decode", "prefill", "hybrid", "generate", "sweeps")
MAX_OTHER_LOAD = 3.0  # percent of all cores
console = Console()
Keep = Callable[[list[dict[str, Any]], dict[str, Any]], None]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sets = f"{', '.join(cpu_shapes.SETS)} (decode, CPU), {', '.join(cuda_shapes.SETS)} (decode, CUDA), "
    sets += f"{', '.join(batch_shapes.PREFILL_SETS)} (prefill), {', '.join(batch_shapes.HYBRID_SETS)} (hybrid), "
    sets += f"{', '.join(generate_models.SETS)} (generate)"
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--operation", choices=OPERATIONS, default="decode")
    parser.add_argument("--quick", action="store_true", help="two shapes and fewer rounds")
    parser.add_argument(
        "--shapes",
        help=f"comma-separated: {sets}, or sizes: batch:q_heads:kv_heads:head_dim:kv_len[:page_size] to decode, "
        "batch:q_heads:kv_heads:head_dim:length to prefill, batch:...:kv_len:chunk:prefill_percent for a hybrid batch, "
        f"model:batch:context to generate, of the models {', '.join(generate_models.SIZES)}",
    )
    parser.add_argument(
        "--formats",
        help="comma-separated kv_format names; also 'NAME static' for one scale for each KV head (not to decode on a "
        "CPU), to prefill also 'fresh fp16' etc.",
    )
    parser.add_argument("--threads", help="comma-separated thread counts (CPU; default: 1,2 to decode, else 2)")
    parser.add_argument("--peers", help="comma-separated, all by default; '' for none")
    parser.add_argument(
        "--ggml", type=Path, default=os.environ.get("GGML_LIBRARY_DIR"), help="folder of a built libggml"
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="turns of each contender (CPU, generate); published is their median"
    )
    parser.add_argument("--save", type=Path, help="results file (JSON); a plot is written beside it")
    parser.add_argument(
        "--append", action="store_true", help="add this run to the results file instead of replacing it"
    )
    parser.add_argument(
        "--render", type=Path, metavar="DOCUMENT", help="rewrite the marked tables of a document and stop"
    )
    return parser.parse_args()


def decode_cells(row: dict[str, Any], is_gpu: bool) -> list[str]:
    ratio = row["milliseconds"] / row["floor_milliseconds"]
    time = f"{row['milliseconds'] * 1e3:.1f}" if is_gpu else f"{row['milliseconds']:.3f}"
    rate, percent = row["gigabytes_per_second"], row["percent_of_read_bandwidth"]
    return [time, f"{ratio:.2f}x", f"{rate:.1f}", f"{percent:.0f}", f"{row['relative_error']:.1e}"]


def batch_cells(row: dict[str, Any], fastest: float, is_gpu: bool) -> list[str]:
    ratio, percent = row["milliseconds"] / fastest, row["percent_of_matrix_rate"]
    rate = f"{row['gigaflop_per_second'] / (1e3 if is_gpu else 1):.1f}"
    return [f"{row['milliseconds']:.3f}", f"{ratio:.2f}x", rate, f"{percent:.0f}", f"{row['relative_error']:.1e}"]


def generate_cells(row: dict[str, Any]) -> list[str]:
    gigabytes = [f"{row[name] / 1e9:.2f}" if row[name] else "-" for name in ("cache_bytes", "peak_bytes")]
    return [f"{row['milliseconds']:.2f}", f"{row['tokens_per_second']:.1f}", *gigabytes, f"{row['relative_error']:.1e}"]


def show(rows: list[dict[str, Any]]) -> None:
    """One table per shape and, on a CPU, thread count."""
    first = rows[0]
    is_gpu, is_batch, is_model = "threads" not in first, "flop" in first, "tokens_per_second" in first
    columns = ("us" if is_gpu else "ms", "of floor", "GB/s", "% of read", "error")
    if is_batch:
        columns = ("ms", "of fastest", "TFLOP/s" if is_gpu else "GFLOP/s", "% of matrix rate", "error")
    if is_model:
        columns = ("ms per step", "tokens/s", "cache GB", "peak GB", "error")
    title = first["shape"] if is_gpu else f"{first['shape']}, {first['threads']} thread(s)"
    table = Table("contender", *columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rows = sorted(rows, key=lambda row: row.get("milliseconds", float("inf")))
    for row in rows:
        if "failure" in row:
            table.add_row(row["contender"], "-", "-", "-", "-", row["failure"], style="dim")
            continue
        if is_model:
            cells = generate_cells(row)
        else:
            cells = batch_cells(row, rows[0]["milliseconds"], is_gpu) if is_batch else decode_cells(row, is_gpu)
        table.add_row(row["contender"], *cells, style="bold" if row["contender"].startswith(report.OURS) else None)
    console.print(table)
    if (load := rows[0].get("other_load_percent", 0)) > MAX_OTHER_LOAD:
        console.print(f"other processes took {load} % of the cores: these times are not to be trusted", style="red")


def choose_peers(arguments: argparse.Namespace, known: tuple[str, ...]) -> list[str]:
    names = list(known) if arguments.peers is None else [name for name in arguments.peers.split(",") if name]
    if unknown := set(names) - set(known):
        raise ValueError(f"--peers: a peer must be one of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    return names


def shapes_to_measure(arguments: argparse.Namespace, device: str) -> list[tuple[str, Any]]:
    """Shapes, each behind the name of its set."""
    operation = arguments.operation
    if operation == "decode" and device == "cuda":
        quick = [("models", shape) for shape in cuda_shapes.QUICK]
        return quick if arguments.quick else cuda_shapes.parse_shapes(arguments.shapes or cuda_shapes.DEFAULT_SETS)
    quick, parse, set_of = {
        "decode": (cpu_shapes.QUICK, cpu_shapes.parse_shapes, cpu_shapes.set_of),
        "prefill": (batch_shapes.QUICK_PREFILL, batch_shapes.parse_prefill_shapes, batch_shapes.set_of),
        "hybrid": (batch_shapes.QUICK_HYBRID, batch_shapes.parse_hybrid_shapes, batch_shapes.set_of),
    }[operation]
    default = "models" if operation == "decode" else batch_shapes.DEFAULT_SETS[device, operation]
    return [(set_of(shape), shape) for shape in (quick if arguments.quick else parse(arguments.shapes or default))]


def cpu_jobs(arguments: argparse.Namespace) -> list[Any]:
    """What to measure on a CPU."""
    from benchmarking import cpu_suite, cpu_workloads, sweeps

    is_sweep = arguments.operation == "sweeps"
    known = cpu_workloads.PEERS["decode"] if is_sweep else cpu_workloads.PEERS[arguments.operation]
    peers = choose_peers(arguments, known)
    if "ggml" in peers and arguments.ggml is None:
        console.print("ggml is left out: --ggml DIR names the folder of a built libggml", style="dim")

    def options(operation: str) -> cpu_workloads.Options:
        formats = arguments.formats or cpu_workloads.FORMATS[operation]
        rounds = min(3, arguments.rounds) if arguments.quick else arguments.rounds
        return cpu_workloads.Options(formats.split(","), peers, rounds, arguments.ggml)

    if is_sweep:
        chosen = sweeps.sweeps(arguments.quick)
        return [cpu_suite.Job(shape, options(one.operation), one.name) for one in chosen for shape in one.shapes]
    return [cpu_suite.Job(shape, options(arguments.operation)) for _, shape in shapes_to_measure(arguments, "cpu")]


def measure_cpu(arguments: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    from benchmarking import cpu_suite

    threads = arguments.threads or ("1,2" if arguments.operation == "decode" else "2")
    return cpu_suite.run(cpu_jobs(arguments), [int(count) for count in threads.split(",")], keep)


def cuda_jobs(arguments: argparse.Namespace) -> list[Any]:
    """What to measure on a CUDA device."""
    from benchmarking import cuda_peers, cuda_suite, sweeps

    peers = choose_peers(arguments, cuda_suite.PEERS[arguments.operation])
    for name, reason in cuda_peers.missing(peers).items():
        console.print(f"{name} is left out: {reason}", style="dim")

    def options(operation: str, formats: dict[str, str]) -> cuda_suite.Options:
        return cuda_suite.Options((arguments.formats or formats[operation]).split(","), peers)

    if arguments.operation == "sweeps":
        return [
            cuda_suite.Job(shape, options(one.operation, cuda_suite.SWEEP_FORMATS), one.name)
            for one in sweeps.cuda_sweeps(arguments.quick)
            for shape in one.shapes
        ]
    chosen = options(arguments.operation, cuda_suite.FORMATS)
    return [cuda_suite.Job(shape, chosen, name) for name, shape in shapes_to_measure(arguments, "cuda")]


def measure_cuda(arguments: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    from benchmarking import cuda_suite

    return cuda_suite.run(cuda_jobs(arguments), keep, with_append=arguments.operation == "decode")


def measure_generate(arguments: argparse.Namespace, device: str, keep: Keep) -> dict[str, Any]:
    from benchmarking import generate_contenders, generate_suite

    peers = choose_peers(arguments, generate_contenders.PEERS)
    lacking = generate_contenders.missing(peers)
    for name, reason in lacking.items():
        console.print(f"{name} is left out: {reason}", style="dim", markup=False)
    formats = (arguments.formats or generate_contenders.FORMATS[device]).split(",")
    able = [name for name in peers if name not in lacking]
    contenders = generate_contenders.contenders(formats, able, has_graphs=device == "cuda")
    text = arguments.shapes or generate_models.DEFAULT_SET[device]
    shapes = generate_models.QUICK if arguments.quick else generate_models.parse_shapes(text)
    steps = 4 if arguments.quick else generate_suite.TIMED_STEPS
    return generate_suite.run(
        shapes, contenders, device, generate_suite.Options(arguments.rounds, steps, lacking), keep
    )


def measure(arguments: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """The rows of a run, written to the results file after every shape: a run that is cut off leaves its own."""
    from benchmarking import environment

    description, rows = environment.describe_run() | {"operation": arguments.operation}, []
    if device == "cuda":
        from benchmarking import cuda_peers, cuda_suite

        description |= cuda_suite.describe_device()
        description["versions"] |= cuda_peers.versions()
    earlier = []
    if arguments.save is not None:
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        if arguments.append and arguments.save.exists():
            earlier = json.loads(arguments.save.read_text())["runs"]

    def keep(new: list[dict[str, Any]], limits: dict[str, Any]) -> None:
        rows.extend(new)
        show(new)
        if arguments.save is not None:
            content = {"runs": [*earlier, description | limits | {"rows": rows}]}
            arguments.save.write_text(json.dumps(content, indent=1) + "\n")

    if arguments.operation == "generate":
        console.print(measure_generate(arguments, device, keep))
    else:
        console.print((measure_cuda if device == "cuda" else measure_cpu)(arguments, keep))
    return rows


def plot(path: Path) -> None:
    """Draws the results file's plots beside it; sweeps also become a CSV file."""
    content = json.loads(path.read_text())
    if content["runs"][-1]["operation"] == "sweeps":
        from benchmarking import sweeps

        sweeps.write_csv(content, path.with_suffix(".csv"))
        sweeps.plot(content, path.with_suffix(".png"))
        console.print(f"wrote {path}, and its CSV file and charts")
        return
    results = report.Results(content)
    labels = [shape.label for shape in (*cpu_shapes.MODELS, *cuda_shapes.MODELS)]
    shapes = [shape for shape in results.shapes() if shape in labels] or results.shapes()[:6]
    report.plot(results, path.with_suffix(".png"), shapes)
    if results.is_gpu and content["runs"][-1]["operation"] == "decode":
        report.plot_floor(results, path.with_name(f"{path.stem}-floor.png"))
    console.print(f"wrote {path} and its plots")


def choose_device(wanted: str) -> str:
    """cuda or cpu; `auto` takes the GPU where there is one."""
    if wanted == "cpu":
        return wanted
    from benchmarking import cuda_suite

    reason = cuda_suite.unavailable()
    if reason is not None and wanted == "cuda":
        raise ValueError(f"--device cuda: {reason}")
    return "cpu" if reason else "cuda"


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
    try:
        device = choose_device(arguments.device)
        if device == "cpu":
            restart_with_huge_pages()
        rows = measure(arguments, device)
    except ValueError as error:
        console.print(f"benchmark: {error}", style="red", markup=False)
        return 2
    if arguments.save is not None:
        plot(arguments.save)
    failures = report.broken_checks(rows)
    for failure in failures:
        console.print(f"WRONG OUTPUT {failure}", style="bold red", markup=False)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
