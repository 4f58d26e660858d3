"""Tables of decoding steps of whole models."""

from __future__ import annotations

from .generate_contenders import GRAPH, REFERENCE
from .results import OURS, Results, Row, Table


def _columns(results: Results, *, is_graph: bool) -> list[str]:
    """Contenders of one kind, the 16-bit peer first; those that nowhere ran are left out."""
    threads = max(results.threads())
    return [
        name
        for name in results.contenders()
        if name.endswith(GRAPH) == is_graph and any(results.row(shape, threads, name) for shape in results.shapes())
    ]


def _shapes(results: Results) -> list[str]:
    """By model, batch and context, whatever order they were measured in."""
    sizes = {row["shape"]: tuple(row["sizes"].values()) for row in results.rows.values()}
    return sorted(results.shapes(), key=lambda shape: sizes[shape])


def _heads(names: list[str]) -> list[str]:
    return [name.removesuffix(GRAPH) for name in names]


def speed_table(results: Results, *, is_graph: bool) -> Table:
    """Tokens per second, all sequences together, and how much faster int8 is than the 16-bit peer of its kind."""
    threads, names = max(results.threads()), _columns(results, is_graph=is_graph)
    peer = next((name for name in names if not name.startswith(OURS)), REFERENCE)
    ours = f"{OURS}int8{GRAPH if is_graph else ''}"
    body = []
    for shape in _shapes(results):
        rows = [results.row(shape, threads, name) for name in names]
        both = [results.row(shape, threads, name) for name in (ours, peer)]
        ratio = f"{both[1]['milliseconds'] / both[0]['milliseconds']:.2f}x" if both[0] and both[1] else "-"
        body.append([shape, *(_speed(row) for row in rows), ratio])
    return ["model, batch x context", *_heads(names), f"int8 against {peer.removesuffix(GRAPH)}"], body


def _speed(row: Row | None) -> str:
    return "-" if row is None else f"{row['tokens_per_second']:.1f} ({row['milliseconds']:.2f} ms)"


def memory_table(results: Results) -> Table:
    """GB of the cache, and the most that torch had allocated during a step, weights included."""
    threads, names = max(results.threads()), _columns(results, is_graph=False)
    body = [[shape, *(_memory(results.row(shape, threads, name)) for name in names)] for shape in _shapes(results)]
    return ["model, batch x context", *names], body


def _memory(row: Row | None) -> str:
    return "-" if row is None else f"{row['cache_bytes'] / 1e9:.2f} / {row['peak_bytes'] / 1e9:.1f}"


def failure_lines(results: Results) -> list[str]:
    """Who could not run, and why."""
    missing = {name: reason for run in results.runs for name, reason in run.get("missing_peers", {}).items()}
    failed = [row for row in results.rows.values() if "failure" in row]
    return [
        *(f"{name}: {reason}" for name, reason in missing.items()),
        *(f"{row['contender']}, {row['shape']}: {row['failure']}" for row in failed),
    ]


def run_lines(results: Results) -> list[str]:
    """What ran where: one line per run."""
    lines = []
    for run in results.runs:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        where = f"{run['gpu']}, CUDA {run['cuda']}" if "gpu" in run else f"{run['cpu']}, {run['cores']} cores"
        lines.append(
            f"`{run['command']}` on {where}, {run['date']}, commit {run['commit']}; {versions}. Medians of "
            f"{run['rounds']} turns of {run['steps']} steps; {run['weight_bytes'] / 1e9:.1f} GB of weights."
        )
    return lines
