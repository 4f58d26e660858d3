"""Tables and plots of benchmark results. The results file is the truth; nothing here measures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import batch_tables, generate_tables
from .results import (
    EIGHT_BIT,
    LARGE_STEP_BYTES,
    MAX_KERNEL_ERROR,
    OURS,
    Results,
    Row,
    Table,
    cell,
    markdown,
)


def peers_table(results: Results) -> Table:
    """Our 8-bit formats against the fastest peer; in brackets the ratio to the floor of the format's own bytes."""
    threads = max(results.threads())
    head = ["shape", "int8 floor", *EIGHT_BIT, "fastest peer", "int8 is faster by"]
    body = []
    for shape in results.shapes():
        ours, peer = results.ours(shape, threads, "int8"), results.best_peer(shape, threads)
        if ours is None or peer is None:
            continue
        formats = [
            cell(
                results.ours(shape, threads, name),
                lambda row: f"{results.time(row)} ({row['milliseconds'] / row['floor_milliseconds']:.2f}x)",
            )
            for name in EIGHT_BIT
        ]
        ratio = f"{peer['milliseconds'] / ours['milliseconds']:.{2 if results.is_gpu else 1}f}x"
        floor = results.time({"milliseconds": ours["floor_milliseconds"]})
        body.append([shape, floor, *formats, f"{results.time(peer)} {peer['contender']}", ratio])
    return head, body


def contenders_table(results: Results, choose: Callable[[str], bool]) -> Table:
    """Milliseconds of every chosen contender on every shape, at the largest thread count."""
    threads = max(results.threads())
    chosen = [name for name in results.contenders() if choose(name)]
    head = ["shape", *(name.removeprefix(OURS) for name in chosen)]
    body = [
        [shape, *(cell(results.row(shape, threads, name), results.time) for name in chosen)]
        for shape in results.shapes()
    ]
    return head, [cells for cells in body if any(cell != "-" for cell in cells[1:])]


def bandwidth_table(results: Results) -> Table:
    """Percent of the read bandwidth measured in the same run, by format."""
    threads = max(results.threads())
    chosen = [name for name in results.contenders() if name.startswith(OURS)]
    head = ["shape", *(name.removeprefix(OURS) for name in chosen)]

    def percent(row: Row) -> str:
        return f"{row['percent_of_read_bandwidth']:.0f} %"

    body = [
        [shape, *(cell(results.row(shape, threads, name), percent) for name in chosen)] for shape in results.shapes()
    ]
    return head, body


def threads_table(results: Results) -> Table:
    """int8 with one and with more threads."""
    counts = results.threads()
    head = ["shape", *(f"{count} thread{'s' if count > 1 else ''}" for count in counts), "speed-up"]
    body = []
    for shape in results.shapes():
        rows = [results.ours(shape, count, "int8") for count in counts]
        if len(rows) > 1 and all(rows):
            speed_up = rows[0]["milliseconds"] / rows[-1]["milliseconds"]  # type: ignore[index]
            body.append([shape, *(cell(row, results.time) for row in rows), f"{speed_up:.2f}x"])
    return head, body


def errors_table(results: Results) -> Table:
    """Largest relative error of each contender against float64 on its own dequantised cache, over all shapes."""
    body = []
    for name in results.contenders():
        errors = [
            row["relative_error"] for row in results.rows.values() if row["contender"] == name and "failure" not in row
        ]
        if errors:
            body.append([name, f"{max(errors):.1e}"])
    return ["contender", "largest error"], body


def losses(results: Results) -> list[str]:
    """Every measured case where a peer beats one of our formats, or an 8-bit format of ours is slower than our fp16."""
    found = []
    for shape in results.shapes():
        for threads in results.threads():
            peer, fp16 = results.best_peer(shape, threads), results.ours(shape, threads, "fp16")
            for name in EIGHT_BIT:
                row = results.ours(shape, threads, name)
                for rival in (peer, fp16):
                    if row and rival and rival["milliseconds"] < row["milliseconds"]:
                        unit, where = ("us", "") if results.is_gpu else ("ms", f", {threads} thread(s)")
                        times = f"{results.time(row)} {unit}, {rival['contender']} {results.time(rival)} {unit}"
                        found.append(f"{shape}{where}: {name} {times}")
    return found


def targets_table(results: Results) -> Table:
    """Each 8-bit format against 0.9 of FlashInfer's fastest 8-bit time, XQA's time, and the memory's limit."""
    head = ["shape", "format", "us", "of FlashInfer's (0.90)", "of XQA's (1.00)", "limit", "reached"]
    body = []
    for shape in results.shapes():
        flashinfer, xqa = (results.best_peer(shape, 0, name) for name in ("FlashInfer e4m3", "XQA"))
        for name in EIGHT_BIT:
            row = results.ours(shape, 0, name)
            if row is None:
                continue
            ratios = [row["milliseconds"] / peer["milliseconds"] if peer else None for peer in (flashinfer, xqa)]
            over, percent = (row["milliseconds"] - row["floor_milliseconds"]) * 1e3, row["percent_of_read_bandwidth"]
            is_large = row["cache_bytes"] > LARGE_STEP_BYTES
            limit = f"{percent:.0f} % of 93 %" if is_large else f"floor + {over:.1f} of 5 us"
            reached = [ratio is None or ratio <= most for ratio, most in zip(ratios, (0.9, 1.0), strict=True)]
            reached.append(percent >= 93 if is_large else over <= 5)
            cells = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            body.append([shape, name, results.time(row), *cells, limit, f"{sum(reached)} of 3"])
    return head, body


def append_table(results: Results) -> Table:
    """append_kv against the floor of what it reads and writes."""
    body = [
        [
            row["operation"],
            f"{row['microseconds']:.2f}",
            f"{row['floor_microseconds']:.2f}",
            f"{row['microseconds'] / row['floor_microseconds']:.2f}x",
        ]
        for row in results.runs[-1].get("append", [])
    ]
    return ["operation", "us", "floor us", "ratio"], body


def _rates(by_threads: dict[str, dict[str, float]], unit: str) -> str:
    """The best rate with each thread count, then that of every program."""
    return "; ".join(
        f"{threads} thread(s) {max(rates.values()):.1f} {unit} ({', '.join(f'{k} {v}' for k, v in rates.items())})"
        for threads, rates in by_threads.items()
    )


def _gpu_limits(run: Row) -> str:
    """What the rows of a GPU's run are judged by."""
    limits = ""
    if bandwidth := run.get("read_bandwidth_gigabytes_per_second"):
        limits = f"Floor: {run['fixed_microseconds']} us + bytes / {bandwidth['0']['read kernel']} GB/s. "
    if products := run.get("matrix_rate_gigaflop_per_second"):
        rates = ", ".join(f"{name} {rate / 1e3:.0f}" for name, rate in products["0"].items())
        limits += f"Matrix products, TFLOP/s: {rates}. "
    return limits


def run_lines(results: Results) -> list[str]:
    """What ran where: one line per run."""
    lines = []
    for run in results.runs:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        bandwidth = run.get("read_bandwidth_gigabytes_per_second")
        if "gpu" in run:
            peers = "".join(f", {name} {us}" for name, us in run.get("eager_peers_microseconds", {}).items())
            lines.append(
                f"`{run['command']}` on {run['gpu']}, CUDA {run['cuda']}, {run['date']}, commit {run['commit']}; "
                f"{versions}. {_gpu_limits(run)}Eager call: {run['eager_call_microseconds']} us of host time{peers}."
            )
            continue
        limits = f"Read bandwidth: {_rates(bandwidth, 'GB/s')}. " if bandwidth else ""
        if products := run.get("matrix_rate_gigaflop_per_second"):
            limits += f"Matrix products in float32: {_rates(products, 'GFLOP/s')}. "
        machine = f"{run['cpu']}, {run['cores']} cores, {run['last_level_cache_mib']} MiB L3"
        loads: dict[int, float] = {}
        for row in run["rows"]:
            loads[row["threads"]] = max(loads.get(row["threads"], 0.0), row.get("other_load_percent", 0.0))
        others = ", ".join(f"{load:.0f} % with {threads}" for threads, load in loads.items())
        lines.append(
            f"`{run['command']}` on {machine}, {run['date']}, commit {run['commit']}; {versions}. "
            f"{limits}Eager call: {run['eager_call_microseconds']} us. "
            f"Other processes took at most this much of all cores while calls were timed: {others} thread(s)."
        )
    return lines


def broken_checks(rows: Iterable[Row]) -> list[str]:
    """This library's rows that failed, or whose output is not what float64 says."""
    broken = []
    for row in rows:
        if not row["contender"].startswith(OURS):
            continue
        what = f"{row['contender']}, {row['shape']}"
        if "failure" in row:
            broken.append(f"{what}: {row['failure']}")
        elif not row["relative_error"] <= (bound := row.get("max_error", MAX_KERNEL_ERROR)):
            broken.append(f"{what}: kernel error must be at most {bound:g}, got {row['relative_error']:.2e}")
    return broken


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "- none"


# What a marker `<!-- benchmark FILE NAME -->` in a document may name; NAME@SET keeps the shapes of one set.
VIEWS: dict[str, Callable[[Results], str]] = {
    "peers": lambda results: markdown(peers_table(results)),
    "all-peers": lambda results: markdown(contenders_table(results, lambda name: not name.startswith(OURS))),
    "formats": lambda results: markdown(contenders_table(results, lambda name: name.startswith(OURS))),
    "bandwidth": lambda results: markdown(bandwidth_table(results)),
    "threads": lambda results: markdown(threads_table(results)),
    "errors": lambda results: markdown(errors_table(results)),
    "targets": lambda results: markdown(targets_table(results)),
    "append": lambda results: markdown(append_table(results)),
    "losses": lambda results: _list(losses(results)),
    "runs": lambda results: _list(run_lines(results)),
    "prefill": lambda results: markdown(batch_tables.prefill_table(results)),
    "prefill-caches": lambda results: markdown(batch_tables.caches_table(results)),
    "rates": lambda results: markdown(batch_tables.rates_table(results)),
    "fresh-rates": lambda results: markdown(batch_tables.fresh_rates_table(results)),
    "prefill-targets": lambda results: markdown(batch_tables.prefill_targets_table(results)),
    "hybrid": lambda results: markdown(batch_tables.hybrid_table(results)),
    "generate": lambda results: markdown(generate_tables.speed_table(results, is_graph=False)),
    "generate-graphs": lambda results: markdown(generate_tables.speed_table(results, is_graph=True)),
    "generate-memory": lambda results: markdown(generate_tables.memory_table(results)),
    "generate-failures": lambda results: _list(generate_tables.failure_lines(results)),
    "generate-runs": lambda results: _list(generate_tables.run_lines(results)),
    "batch-losses": lambda results: _list(batch_tables.batch_losses(results)),
}
_MARKED = re.compile(r"(<!-- benchmark (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render_document(document: Path, root: Path) -> int:
    """Rewrites every marked table of a document from the results files it names; returns how many there were."""

    def view(match: re.Match[str]) -> str:
        begin, file, name, end = match.groups()
        view_name, _, chosen = name.partition("@")
        if view_name not in VIEWS:
            raise ValueError(f"{document}: a marker must name one of {', '.join(VIEWS)}, got {name}")
        return f"{begin}{VIEWS[view_name](Results.load(root / file, chosen))}\n{end}"

    text, count = _MARKED.subn(view, document.read_text())
    document.write_text(text)
    return count


def plot(results: Results, path: Path, shapes: Sequence[str]) -> None:
    """Milliseconds per step of our formats and the peers, a panel per shape, the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    threads = max(results.threads())
    operation = results.runs[-1].get("operation", "decode")
    scale, unit = (1e3, "us per step") if results.is_gpu and operation == "decode" else (1.0, "ms per step")
    columns = min(3, len(shapes))
    figure, axes = pyplot.subplots(
        -(-len(shapes) // columns), columns, figsize=(5 * columns, 3.6 * -(-len(shapes) // columns)), squeeze=False
    )
    for axis, shape in zip(axes.flat, shapes, strict=False):
        rows = [row for name in results.contenders() if (row := results.row(shape, threads, name))]
        rows.sort(key=lambda row: row["milliseconds"], reverse=True)
        colours = ["#1f6feb" if row["contender"].startswith(OURS) else "#b0b7c3" for row in rows]
        axis.barh(
            [row["contender"].removeprefix(OURS) for row in rows],
            [row["milliseconds"] * scale for row in rows],
            color=colours,
        )
        reference = results.ours(shape, threads, "int8")
        if reference and "floor_milliseconds" in reference:
            axis.axvline(reference["floor_milliseconds"] * scale, color="#d1242f", linewidth=1.2)
        axis.set_title(shape, fontsize=10)
        axis.tick_params(labelsize=7)
        axis.set_xlabel(unit, fontsize=8)
    for axis in axes.flat[len(shapes) :]:
        axis.set_visible(False)
    where = results.runs[-1]["gpu"] if results.is_gpu else f"{threads} threads"
    floor = "; red line: int8 memory floor" if any("floor_milliseconds" in row for row in results.rows.values()) else ""
    figure.suptitle(f"{operation.capitalize()}, {where}. Blue: pyquantattn; grey: peers{floor}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_floor(results: Results, path: Path) -> None:
    """Time over the floor of every step of our formats, by its bytes: what a step costs beyond reading its cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5))
    for name in dict.fromkeys(key[2] for key in results.rows if key[2].startswith(OURS)):
        rows = [row for key, row in results.rows.items() if key[2] == name and "failure" not in row]
        axis.scatter(
            [row["cache_bytes"] / 1e6 for row in rows],
            [row["milliseconds"] / row["floor_milliseconds"] for row in rows],
            s=14,
            alpha=0.7,
            label=name.removeprefix(OURS),
        )
    axis.axhline(1.0, color="#d1242f", linewidth=1.2)
    axis.set(xscale="log", xlabel="MB of cache per step", ylabel="time / floor", ylim=(0.9, None))
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
