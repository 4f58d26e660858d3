"""Tables and plots of benchmark results. The results file is the truth; nothing here measures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

OURS = "pyquantattn "
EIGHT_BIT = ("int8", "fp8_e4m3", "fp8_e5m2")


class Results:
    """The rows of one results file, by shape, threads and contender; a later run's row replaces an earlier one's."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.runs: list[dict[str, Any]] = content["runs"]
        self.rows: dict[tuple[str, int, str], Row] = {}
        for run in self.runs:
            for row in run["rows"]:
                self.rows[row["shape"], row["threads"], row["contender"]] = row

    @classmethod
    def load(cls, path: Path) -> Results:
        return cls(json.loads(path.read_text()))

    def shapes(self) -> list[str]:
        return list(dict.fromkeys(shape for shape, _, _ in self.rows))

    def threads(self) -> list[int]:
        return sorted({threads for _, threads, _ in self.rows})

    def row(self, shape: str, threads: int, contender: str) -> Row | None:
        """The measured row; None where there is none or the contender could not run."""
        row = self.rows.get((shape, threads, contender))
        return None if row is None or "failure" in row else row

    def ours(self, shape: str, threads: int, kv_format: str) -> Row | None:
        return self.row(shape, threads, OURS + kv_format)

    def best_peer(self, shape: str, threads: int) -> Row | None:
        measured = (
            row
            for row in self.rows.values()
            if row["shape"] == shape and row["threads"] == threads and "failure" not in row
        )
        peers = [row for row in measured if not row["contender"].startswith(OURS)]
        return min(peers, key=lambda row: row["milliseconds"], default=None)

    def contenders(self) -> list[str]:
        return list(dict.fromkeys(contender for _, _, contender in self.rows))


def _cell(row: Row | None, text: Callable[[Row], str]) -> str:
    return "-" if row is None else text(row)


def _time(row: Row) -> str:
    return f"{row['milliseconds']:.3f}"


def _time_and_floor(row: Row) -> str:
    return f"{row['milliseconds']:.3f} ({row['milliseconds'] / row['floor_milliseconds']:.2f}x)"


def peers_table(results: Results) -> Table:
    """Our 8-bit formats against the fastest peer; in brackets the ratio to the floor of the format's own bytes."""
    threads = max(results.threads())
    head = ["shape", "int8 floor", *EIGHT_BIT, "fastest peer", "int8 is faster by"]
    body = []
    for shape in results.shapes():
        ours, peer = results.ours(shape, threads, "int8"), results.best_peer(shape, threads)
        if ours is None or peer is None:
            continue
        formats = [_cell(results.ours(shape, threads, name), _time_and_floor) for name in EIGHT_BIT]
        ratio = f"{peer['milliseconds'] / ours['milliseconds']:.1f}x"
        body.append([shape, f"{ours['floor_milliseconds']:.3f}", *formats, f"{_time(peer)} {peer['contender']}", ratio])
    return head, body


def contenders_table(results: Results, choose: Callable[[str], bool]) -> Table:
    """Milliseconds of every chosen contender on every shape, at the largest thread count."""
    threads = max(results.threads())
    chosen = [name for name in results.contenders() if choose(name)]
    head = ["shape", *(name.removeprefix(OURS) for name in chosen)]
    body = [
        [shape, *(_cell(results.row(shape, threads, name), _time) for name in chosen)] for shape in results.shapes()
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
        [shape, *(_cell(results.row(shape, threads, name), percent) for name in chosen)] for shape in results.shapes()
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
            body.append([shape, *(_cell(row, _time) for row in rows), f"{speed_up:.2f}x"])
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
                        times = f"{_time(row)} ms, {rival['contender']} {_time(rival)} ms"
                        found.append(f"{shape}, {threads} thread(s): {name} {times}")
    return found


def run_lines(results: Results) -> list[str]:
    """What ran where: one line per run."""
    lines = []
    for run in results.runs:
        limits = "; ".join(
            f"{threads} thread(s) {max(reads.values()):.1f} GB/s ({', '.join(f'{k} {v}' for k, v in reads.items())})"
            for threads, reads in run["read_bandwidth_gigabytes_per_second"].items()
        )
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        machine = f"{run['cpu']}, {run['cores']} cores, {run['last_level_cache_mib']} MiB L3"
        loads: dict[int, float] = {}
        for row in run["rows"]:
            loads[row["threads"]] = max(loads.get(row["threads"], 0.0), row.get("other_load_percent", 0.0))
        others = ", ".join(f"{load:.0f} % with {threads}" for threads, load in loads.items())
        lines.append(
            f"`{run['command']}` on {machine}, {run['date']}, commit {run['commit']}; {versions}. "
            f"Read bandwidth: {limits}. Eager call: {run['eager_call_microseconds']} us. "
            f"Other processes took at most this much of all cores while calls were timed: {others} thread(s)."
        )
    return lines


def markdown(table: Table) -> str:
    head, body = table
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "- none"


# What a marker `<!-- benchmark FILE NAME -->` in a document may name.
VIEWS: dict[str, Callable[[Results], str]] = {
    "peers": lambda results: markdown(peers_table(results)),
    "all-peers": lambda results: markdown(contenders_table(results, lambda name: not name.startswith(OURS))),
    "formats": lambda results: markdown(contenders_table(results, lambda name: name.startswith(OURS))),
    "bandwidth": lambda results: markdown(bandwidth_table(results)),
    "threads": lambda results: markdown(threads_table(results)),
    "errors": lambda results: markdown(errors_table(results)),
    "losses": lambda results: _list(losses(results)),
    "runs": lambda results: _list(run_lines(results)),
}
_MARKED = re.compile(r"(<!-- benchmark (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render_document(document: Path, root: Path) -> int:
    """Rewrites every marked table of a document from the results files it names; returns how many there were."""

    def view(match: re.Match[str]) -> str:
        begin, file, name, end = match.groups()
        if name not in VIEWS:
            raise ValueError(f"{document}: a marker must name one of {', '.join(VIEWS)}, got {name}")
        return f"{begin}{VIEWS[name](Results.load(root / file))}\n{end}"

    text, count = _MARKED.subn(view, document.read_text())
    document.write_text(text)
    return count


def plot(results: Results, path: Path, shapes: Sequence[str]) -> None:
    """Milliseconds per step of our formats and the peers, a panel per shape, the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    threads = max(results.threads())
    columns = min(3, len(shapes))
    figure, axes = pyplot.subplots(
        -(-len(shapes) // columns), columns, figsize=(5 * columns, 3.6 * -(-len(shapes) // columns)), squeeze=False
    )
    for axis, shape in zip(axes.flat, shapes, strict=False):
        rows = [row for name in results.contenders() if (row := results.row(shape, threads, name))]
        rows.sort(key=lambda row: row["milliseconds"], reverse=True)
        colours = ["#1f6feb" if row["contender"].startswith(OURS) else "#b0b7c3" for row in rows]
        axis.barh(
            [row["contender"].removeprefix(OURS) for row in rows], [row["milliseconds"] for row in rows], color=colours
        )
        if reference := results.ours(shape, threads, "int8"):
            axis.axvline(reference["floor_milliseconds"], color="#d1242f", linewidth=1.2)
        axis.set_title(shape, fontsize=10)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("ms per step", fontsize=8)
    for axis in axes.flat[len(shapes) :]:
        axis.set_visible(False)
    figure.suptitle(
        f"Decode, {threads} threads. Blue: pyquantattn; grey: peers; red line: int8 memory floor", fontsize=11
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
