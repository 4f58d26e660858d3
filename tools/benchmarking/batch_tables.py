"""Tables of prefill and hybrid batches."""

from __future__ import annotations

from .results import EIGHT_BIT, OURS, Results, Row, Table, cell

TYPES = ("fp32", "bf16", "fp16")
CACHES = (*EIGHT_BIT, "fp16", "bf16")
FRESH = "fresh "
SEPARATE = " separate"


def _beside(results: Results, row: Row | None, other: Row | None) -> str:
    """The time of a row and, in brackets, its ratio to another's."""
    if row is None or other is None:
        return cell(row, results.time)
    return f"{results.time(row)} ({row['milliseconds'] / other['milliseconds']:.2f}x)"


def prefill_table(results: Results) -> Table:
    """Fresh K and V: our time of every type, in brackets its ratio to torch's of the same type; then every peer's."""
    threads = max(results.threads())
    peers = [name for name in results.contenders() if not name.startswith(OURS)]
    head = ["shape", *(f"{name}" for name in TYPES), *peers]
    body = []
    for shape in results.shapes():
        pairs = [
            (results.ours(shape, threads, FRESH + name), results.row(shape, threads, f"torch {name}")) for name in TYPES
        ]
        ours = [_beside(results, *pair) for pair in pairs]
        body.append([shape, *ours, *(cell(results.row(shape, threads, name), results.time) for name in peers)])
    return head, body


def caches_table(results: Results) -> Table:
    """The same prompts over caches; in brackets the ratio to fresh float32 K and V."""
    threads = max(results.threads())
    body = []
    for shape in results.shapes():
        fresh = results.ours(shape, threads, f"{FRESH}fp32")
        caches = [_beside(results, results.ours(shape, threads, name), fresh) for name in CACHES]
        body.append([shape, cell(fresh, results.time), *caches])
    return ["shape", f"{FRESH}fp32", *CACHES], body


def rates_table(results: Results) -> Table:
    """GFLOP/s of everything, and percent of the rate of float32 matrix products measured in the same run."""
    threads = max(results.threads())

    def rate(row: Row) -> str:
        return f"{row['gigaflop_per_second']:.0f} ({row['percent_of_matrix_rate']:.0f} %)"

    names = [name for name in results.contenders() if not name.endswith(SEPARATE)]
    body = [
        [shape, *(cell(results.row(shape, threads, name), rate) for name in names)] for shape in results.shapes()
    ]  # fmt: skip
    return ["shape", *(name.removeprefix(OURS) for name in names)], body


def hybrid_table(results: Results) -> Table:
    """One call for the batch, in brackets its ratio to separate calls for the two kinds of sequences."""
    threads = max(results.threads())
    names = [name.removeprefix(OURS) for name in results.contenders() if not name.endswith(SEPARATE)]
    head = ["shape", *(title for name in names for title in (name, name + SEPARATE))]
    body = []
    for shape in results.shapes():
        cells = []
        for name in names:
            separate = results.ours(shape, threads, name + SEPARATE)
            cells += [_beside(results, results.ours(shape, threads, name), separate), cell(separate, results.time)]
        body.append([shape, *cells])
    return head, body


def batch_losses(results: Results) -> list[str]:
    """Every shape where torch reads prompts of the same type faster, or separate calls beat the one call."""
    found = []
    rivals = {FRESH + name: f"torch {name}" for name in TYPES}
    rivals |= {name: OURS + name + SEPARATE for name in CACHES}
    for (shape, threads, contender), row in results.rows.items():
        name = contender.removeprefix(OURS)
        rival = results.row(shape, threads, rivals[name]) if contender.startswith(OURS) and name in rivals else None
        if rival and "failure" not in row and rival["milliseconds"] < row["milliseconds"]:
            times = f"{name} {results.time(row)} ms, {rival['contender'].removeprefix(OURS)} {results.time(rival)} ms"
            found.append(f"{shape}, {threads} thread(s): {times}")
    return found
