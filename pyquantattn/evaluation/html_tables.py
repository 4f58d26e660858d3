"""The tables of the HTML report."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from pyquantattn.evaluation.verdict import DO_NOT_USE, INDISTINGUISHABLE, VISIBLE

Json = dict[str, Any]
Cell = str | tuple[str, str]  # a text, or a text and its class
Row = tuple[Cell, ...]
CLASSES = {INDISTINGUISHABLE: "good", VISIBLE: "fair", DO_NOT_USE: "bad", None: "none"}
UNCHANGED = "-"  # a greedy continuation that never left the reference's


def tables(record: Json) -> Iterable[str]:
    """Every table with its heading."""
    results = record["results"]
    formats = results["formats"]
    if any("model" in figures for figures in formats.values()):
        yield "<h2>Predictions (teacher-forced decode through the cache)</h2>"
        yield _table(_MODEL_HEADER, [_model_row(name, figures) for name, figures in formats.items()])
        yield "<h2>Greedy continuations and time</h2>"
        times = record["measured_times"]
        yield _table(_GREEDY_HEADER, [_greedy_row(name, figures, times[name]) for name, figures in formats.items()])
    yield "<h2>K alone, V alone</h2>"
    yield _table(("format", "quantised", "output error", "mean KLD", "same top-1 %"), list(_ablation_rows(formats)))
    yield "<h2>Attention output and codec</h2>"
    yield _table(_ATTENTION_HEADER, [_attention_row(name, figures) for name, figures in formats.items()])
    yield "<h2>Output error, worst context of each layer</h2>"
    yield _table(("layer", *formats), list(_layer_rows(formats)))
    yield "<h2>Controls</h2>"
    yield _table(("control", "expected", "found", "state"), list(_control_rows(results["controls"])), "text")
    if results["warnings"]:
        yield "<h2>Warnings</h2>"
        rows: list[Row] = [(w["where"], w["what"], w["reason"]) for w in results["warnings"]]
        yield _table(("where", "what", "reason"), rows, "text")


_MODEL_HEADER = (
    "format",
    "n",
    "KLD mean ± SE",
    "median",
    "p95",
    "p99",
    "p99.9",
    "max",
    "same top-1 % ± SE",
    "flips",
    "RMS Δp %",
    "ΔPPL ± SE",
    "correlation",
)
_GREEDY_HEADER = (
    "format",
    "same to the end",
    "first divergence",
    "beyond ties",
    "attention ms per step",
    "bytes per token",
)
_ATTENTION_HEADER = (
    "format",
    "output error mean",
    "p99",
    "max",
    "kernel error max",
    "cosine mean",
    "weight KL",
    "weight TV",
    "top keys kept",
    "LSE error",
    "K RMSE %",
    "V RMSE %",
    "clipped % worst",
)


def _model_row(name: str, figures: Json) -> Row:
    part = figures["model"]["overall"]
    return (
        name,
        f"{part['count']:,}",
        f"{part['kl_mean']:.2e} ± {part['kl_standard_error']:.0e}",
        *(f"{part[key]:.1e}" for key in ("kl_p50", "kl_p95", "kl_p99", "kl_p99.9", "kl_max")),
        f"{part['same_top_percent']:.2f} ± {part['same_top_standard_error']:.2f}",
        str(part["top_flips"]),
        f"{part['p_change_rms']:.3f}",
        f"{part['perplexity_change']:+.5f} ± {part['perplexity_change_standard_error']:.5f}",
        f"{part['nll_correlation']:.6f}",
    )


def _greedy_row(name: str, figures: Json, seconds: float) -> Row:
    greedy = figures["greedy"]
    cells = ("", "", "")
    if greedy:
        places = greedy["first_divergence"]
        shown = " ".join(str(place) if place < greedy["tokens"] else UNCHANGED for place in places)
        same = f"{greedy['texts_without_divergence']} of {len(places)} texts"
        cells = (same, shown, str(greedy["divergences_beyond_ties"]))
    return (name, *cells, f"{1e3 * seconds:.2f}", f"{figures['memory']['bytes_per_token']:.0f}")


def _ablation_rows(formats: Json) -> Iterable[Row]:
    for name, figures in formats.items():
        for only, part in figures["ablations"].items():
            model = part["model"]
            cells = ("", "")
            if model:
                kl = f"{model['kl_mean']:.2e} ± {model['kl_standard_error']:.0e}"
                cells = (kl, f"{model['same_top_percent']:.2f}")
            yield (name, f"{only} only", f"{part['output_error']['mean']:.4f}", *cells)


def _attention_row(name: str, figures: Json) -> Row:
    part, codec = figures["attention"]["overall"], figures["codec"]
    error = part["output_error"]
    return (
        name,
        *(f"{error[key]:.4f}" for key in ("mean", "p99", "max")),
        f"{part['kernel_error']['max']:.1e}",
        f"{part['cosine']['mean']:.6f}",
        f"{part['weight_kl']['mean']:.1e}",
        f"{part['weight_tv']['mean']:.1e}",
        f"{100 * part['top_overlap']['mean']:.1f} %",
        f"{part['lse_error']['mean']:.1e}",
        *(f"{100 * codec[kv]['relative_rmse_mean']:.2f}" for kv in "KV"),
        f"{max(codec[kv]['clipped_percent_worst'] for kv in 'KV'):.2g}",
    )


def _layer_rows(formats: Json) -> Iterable[Row]:
    for label in next(iter(formats.values()))["by_layer"]:
        cells = (figures["by_layer"][label] for figures in formats.values())
        yield (label, *((f"{cell['output_error']:.4f}", CLASSES[cell["word"]]) for cell in cells))


def _control_rows(controls: list[Json]) -> Iterable[Row]:
    for control in controls:
        state = ("passed", "good") if control["passed"] else ("FAILED", "bad")
        yield (control["name"], control["expected"], control["found"], state)


def _table(header: Iterable[str], rows: list[Row], kind: str = "") -> str:
    if not rows:
        return '<p class="muted">Nothing is quantised.</p>'
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    return f'<div class="table"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def _cell(cell: Cell) -> str:
    text, kind = (cell, "") if isinstance(cell, str) else cell
    return f'<td class="{kind}">{escape(text)}</td>'
