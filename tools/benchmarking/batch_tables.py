"""Tables of prefill and hybrid batches."""

from __future__ import annotations

from collections.abc import Callable

from .results import ACCURATE_ERROR, EIGHT_BIT, FRESH, OURS, STATIC, Results, Row, Table, cell

TYPES = ("fp32", "bf16", "fp16")
EIGHT_BIT_CACHES = tuple(name + scales for name in EIGHT_BIT for scales in ("", STATIC))
CACHES = (*EIGHT_BIT_CACHES, "fp16", "bf16")
SEPARATE = " separate"
PAGED = " paged"
# Peers that a prompt is compared with on a GPU, and the share of their time that is aimed at.
PREFILL_AIMS = {
    "torch flash fp16": 1.0,
    "FlashInfer fa2 fp16": 0.91,
    "torch cuDNN fp16": None,
    "FlashInfer fa3 fp16": None,
}
MAX_CACHE_RATIO = 1.15  # of a prompt over an 8-bit cache to one over fresh K and V: what is aimed at


def milliseconds(row: Row) -> str:
    return f"{row['milliseconds']:.3f}"


def _ratio(row: Row | None, other: Row | None) -> float | None:
    return None if row is None or other is None else row["milliseconds"] / other["milliseconds"]


def _beside(row: Row | None, other: Row | None) -> str:
    """The time of a row and, in brackets, its ratio to another's."""
    ratio = _ratio(row, other)
    return cell(row, milliseconds) + ("" if ratio is None else f" ({ratio:.2f}x)")


def _rival(results: Results, shape: str, threads: int, dtype: str) -> Row | None:
    """Whom our prompts of a type are compared with: torch of the same type; on a GPU its flash kernel, of fp16."""
    if not results.is_gpu:
        return results.row(shape, threads, f"torch {dtype}")
    return results.row(shape, threads, "torch flash fp16") or results.row(shape, threads, "torch varlen fp16")


def prefill_table(results: Results) -> Table:
    """Fresh K and V: our time of every type, in brackets its ratio to torch's; then every peer's."""
    threads = max(results.threads())
    names = results.contenders()
    types = [name for name in TYPES if f"{OURS}{FRESH}{name}" in names]
    peers = [name for name in names if not name.startswith(OURS) and not name.endswith(PAGED)]
    body = []
    for shape in results.shapes():
        ours = [
            _beside(results.ours(shape, threads, FRESH + name), _rival(results, shape, threads, name)) for name in types
        ]
        body.append([shape, *ours, *(cell(results.row(shape, threads, name), milliseconds) for name in peers)])
    return ["shape", *types, *peers], body


def caches_table(results: Results) -> Table:
    """The same prompts over caches; in brackets the ratio to fresh K and V of the queries' type. Then paged peers."""
    threads, base = max(results.threads()), FRESH + ("fp16" if results.is_gpu else "fp32")
    names = results.contenders()
    formats = [name for name in CACHES if OURS + name in names]
    peers = [name for name in names if name.endswith(PAGED)]
    body = []
    for shape in results.shapes():
        fresh = results.ours(shape, threads, base)
        caches = [_beside(results.ours(shape, threads, name), fresh) for name in formats]
        others = [cell(results.row(shape, threads, name), milliseconds) for name in peers]
        body.append([shape, cell(fresh, milliseconds), *caches, *others])
    return ["shape", base, *formats, *peers], body


def rates_table(results: Results, choose: Callable[[str], bool] = lambda name: True) -> Table:
    """GFLOP/s (TFLOP/s on a GPU), and percent of the rate of matrix products measured in the same run."""
    threads, scale = max(results.threads()), 1e3 if results.is_gpu else 1.0

    def rate(row: Row) -> str:
        return f"{row['gigaflop_per_second'] / scale:.0f} ({row['percent_of_matrix_rate']:.0f} %)"

    names = [name for name in results.contenders() if not name.endswith(SEPARATE) and choose(name)]
    body = [
        [shape, *(cell(results.row(shape, threads, name), rate) for name in names)] for shape in results.shapes()
    ]  # fmt: skip
    return ["shape", *(name.removeprefix(OURS) for name in names)], body


def fresh_rates_table(results: Results) -> Table:
    """The rates of prompts over fresh K and V alone."""
    return rates_table(results, lambda name: FRESH in name if name.startswith(OURS) else not name.endswith(PAGED))


def prefill_targets_table(results: Results) -> Table:
    """Prompts on a GPU against what is aimed at: peers' times, and 8-bit caches against fresh K and V."""
    aims = [f"of {name}" + (f" ({most:.2f})" if most else "") for name, most in PREFILL_AIMS.items()]
    measured = results.contenders()
    caches = [name for name in EIGHT_BIT_CACHES if name in EIGHT_BIT or OURS + name in measured]
    ratios = [f"{name} over fresh ({MAX_CACHE_RATIO})" for name in caches]
    body = []
    for shape in results.shapes():
        fresh = results.ours(shape, 0, f"{FRESH}fp16")
        if fresh is None:
            continue
        found = [(_ratio(fresh, results.row(shape, 0, name)), most) for name, most in PREFILL_AIMS.items()]
        found += [(_ratio(results.ours(shape, 0, name), fresh), MAX_CACHE_RATIO) for name in caches]
        aimed = [ratio <= most for ratio, most in found if ratio is not None and most is not None]
        cells = ["-" if ratio is None else f"{ratio:.2f}" for ratio, _ in found]
        body.append([shape, milliseconds(fresh), *cells, f"{sum(aimed)} of {len(aimed)}"])
    return ["shape", "fresh fp16, ms", *aims, *ratios, "reached"], body


def hybrid_table(results: Results) -> Table:
    """One call for the batch, in brackets its ratio to separate calls for the two kinds of sequences; then peers."""
    threads = max(results.threads())
    names = [name for name in results.contenders() if not name.endswith(SEPARATE)]
    ours, peers = ([name for name in names if name.startswith(OURS) is mine] for mine in (True, False))
    ours = [name.removeprefix(OURS) for name in ours]
    head = ["shape", *(title for name in ours for title in (name, name + SEPARATE)), *peers]
    body = []
    for shape in results.shapes():
        cells = []
        for name in ours:
            separate = results.ours(shape, threads, name + SEPARATE)
            cells += [_beside(results.ours(shape, threads, name), separate), cell(separate, milliseconds)]
        body.append([shape, *cells, *(cell(results.row(shape, threads, name), milliseconds) for name in peers)])
    return head, body


def _rivals(results: Results, shape: str, threads: int, name: str) -> list[Row]:
    """Whose time a row of ours should not exceed: our separate calls, the fastest accurate peer on the same K and V."""
    separate = results.ours(shape, threads, name + SEPARATE)
    if not results.is_gpu:
        is_fresh = name.removeprefix(FRESH) in TYPES and name.startswith(FRESH)
        peer = results.row(shape, threads, f"torch {name.removeprefix(FRESH)}") if is_fresh else None
        return [row for row in (separate, peer) if row]
    kinds = {
        f"{FRESH}fp16": "fp16",
        f"{FRESH}bf16": "fp16",
        "fp16": f"fp16{PAGED}",
        "fp8_e4m3": f"e4m3{PAGED}",
        f"fp8_e4m3{STATIC}": f"e4m3{PAGED}",
    }
    peers = [
        row
        for peer in results.contenders()
        if name in kinds and not peer.startswith(OURS) and peer.endswith(kinds[name])
        if (row := results.row(shape, threads, peer)) and row["relative_error"] <= ACCURATE_ERROR
    ]
    fastest = min(peers, key=lambda row: row["milliseconds"], default=None)
    return [row for row in (separate, fastest) if row]


def batch_losses(results: Results) -> list[str]:
    """Every shape where a peer on the same K and V, or separate calls in the place of one, are faster than we are."""
    found = []
    for (shape, threads, contender), row in results.rows.items():
        name = contender.removeprefix(OURS)
        if not contender.startswith(OURS) or "failure" in row:
            continue
        for rival in _rivals(results, shape, threads, name):
            if rival["milliseconds"] < row["milliseconds"]:
                where = shape if results.is_gpu else f"{shape}, {threads} thread(s)"
                other = f"{rival['contender'].removeprefix(OURS)} {milliseconds(rival)} ms"
                found.append(f"{where}: {name} {milliseconds(row)} ms, {other}")
    return found
