"""The tables of a record, whatever they are shown in: report.html, report.md, a document."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pyquantattn.evaluation.metrics import agreement_before_ties, mcnemar
from pyquantattn.evaluation.tensor_level import DISTANCE_METRICS, DISTANCES
from pyquantattn.evaluation.verdict import DO_NOT_USE, INDISTINGUISHABLE, TIE_GAP, VISIBLE

Json = dict[str, Any]
Cell = str | tuple[str, str]  # a text, or a text and its class
Row = tuple[Cell, ...]
CLASSES = {INDISTINGUISHABLE: "good", VISIBLE: "fair", DO_NOT_USE: "bad", None: "none"}


@dataclass(frozen=True)
class Table:
    """Rows under a header; figures but for the first column, unless it is a table of texts."""

    key: str  # names the table in a document's marker
    title: str
    header: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    is_text: bool = False


def text_of(cell: Cell) -> str:
    """A cell without its class."""
    return cell if isinstance(cell, str) else cell[0]


def _with_error(mean: float, error: float | None, mean_format: str, error_format: str) -> str:
    """Few values have no standard error: NaN, or null in a record that was read back."""
    has_error = error is not None and math.isfinite(error)
    return f"{mean:{mean_format}}" + (f" ± {error:{error_format}}" if has_error else "")


def _kl(part: Json, mean_format: str = ".2e") -> str:
    return _with_error(part["kl_mean"], part["kl_standard_error"], mean_format, ".0e")


def tables(record: Json) -> list[Table]:
    """Every table that has rows, the verdicts first."""
    results = record["results"]
    formats: Json = results["formats"]
    found = [Table("verdicts", "Verdicts", _VERDICT_HEADER, [_verdict_row(*entry) for entry in formats.items()])]
    if any("model" in figures for figures in formats.values()):
        title = "Predictions (teacher-forced decode through the cache)"
        found.append(Table("predictions", title, _MODEL_HEADER, [_model_row(*entry) for entry in formats.items()]))
        found.append(_context_table(formats))
        times = record["measured_times"]
        rows = [_memory_row(name, figures, times[name]) for name, figures in formats.items()]
        found.append(Table("memory", "Memory and time", _MEMORY_HEADER, rows))
        rows = [_greedy_row(name, figures["greedy"]) for name, figures in formats.items() if figures["greedy"]]
        found.append(Table("greedy", "Greedy continuations", _GREEDY_HEADER, rows))
        needles = {name: figures["needles"] for name, figures in formats.items() if figures.get("needles")}
        found.append(_needle_table(needles, record["settings"]["contexts"]))
    found += [
        Table("ablations", "K alone, V alone", _ABLATION_HEADER, list(_ablation_rows(formats))),
        Table(
            "attention",
            "Attention output and codec",
            _ATTENTION_HEADER,
            [_attention_row(*entry) for entry in formats.items()],
        ),
        Table(
            "distances",
            "Weight TV by distance of the keys",
            ("format", *(f"below {distance}" for distance in DISTANCES), "further"),
            list(_distance_rows(formats)),
        ),
        Table("layers", "Output error, worst context of each layer", ("layer", *formats), list(_layer_rows(formats))),
        Table("controls", "Controls", _CONTROL_HEADER, list(_control_rows(results["controls"])), is_text=True),
        Table("warnings", "Warnings", ("where", "what", "reason"), _warning_rows(results["warnings"]), is_text=True),
    ]
    return [table for table in found if table.rows]


_VERDICT_HEADER = ("format", "bits per value", "verdict", "decided by")
_ABLATION_HEADER = ("format", "quantised", "output error", "mean KLD ± SE", "same top-1 %")
_CONTROL_HEADER = ("control", "expected", "found", "state")
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
    "right to wrong",
    "wrong to right",
    "McNemar p",
    "RMS Δp %",
    "ΔPPL ± SE",
    "correlation",
)
_MEMORY_HEADER = (
    "format",
    "bits per value",
    "bytes per token",
    "bytes per token and layer",
    "tokens per GiB",
    "attention ms per step",
)
_GREEDY_HEADER = ("format", "same to the end", "agreement before ties", "first divergence", "beyond ties")
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


def _verdict_row(name: str, figures: Json) -> Row:
    verdict = figures["verdict"]
    word = (verdict["word"] or "no verdict") + (" (borderline)" if verdict["is_borderline"] else "")
    bits = f"{figures['memory']['bits_per_value']:.3f}"
    return (name, bits, (word, CLASSES[verdict["word"]]), verdict["reason"])


def _context_table(formats: Json) -> Table:
    contexts = next(iter(formats.values()))["model"]["by_context"]
    rows: list[Row] = []
    for name, figures in formats.items():
        parts = [part for part in figures["model"]["by_context"].values() if part["count"]]
        rows.append((name, *(_kl(part, ".1e") for part in parts)))
    filled = [f"up to {context}" for context, part in contexts.items() if part["count"]]
    return Table("contexts", "Mean KLD ± SE by context", ("format", *filled), rows)


def _model_row(name: str, figures: Json) -> Row:
    part = figures["model"]["overall"]
    return (
        name,
        f"{part['count']:,}",
        _kl(part),
        *(f"{part[key]:.1e}" for key in ("kl_p50", "kl_p95", "kl_p99", "kl_p99.9", "kl_max")),
        _with_error(part["same_top_percent"], part["same_top_standard_error"], ".2f", ".2f"),
        *(str(part[key]) for key in ("top_flips", "flips_to_wrong", "flips_to_right")),
        f"{mcnemar(part['flips_to_wrong'], part['flips_to_right']):.2g}",
        f"{part['p_change_rms']:.3f}",
        _with_error(part["perplexity_change"], part["perplexity_change_standard_error"], "+.5f", ".5f"),
        f"{part['nll_correlation']:.6f}",
    )


def _memory_row(name: str, figures: Json, seconds: float) -> Row:
    memory = figures["memory"]
    return (
        name,
        f"{memory['bits_per_value']:.3f}",
        f"{memory['bytes_per_token']:.0f}",
        f"{memory['bytes_per_token_and_layer']:.0f}",
        f"{memory['tokens_per_gib']:,.0f}",
        f"{1e3 * seconds:.2f}",
    )


def _greedy_row(name: str, greedy: Json) -> Row:
    places, gaps = greedy["first_divergence"], greedy["top_gap_at_divergence"]
    diverged = [f"{place} ({gap:.3f})" for place, gap in zip(places, gaps, strict=True) if gap is not None]
    agreeing, counted = agreement_before_ties(places, gaps, greedy["tokens"], TIE_GAP)
    return (
        name,
        f"{greedy['texts_without_divergence']} of {len(places)} texts",
        f"{100 * agreeing / counted:.2f} % of {counted:,}" if counted else "",
        ", ".join(diverged) or "none",
        str(greedy["divergences_beyond_ties"]),
    )


def _needle_table(needles: Json, contexts: list[int]) -> Table:
    columns = (f"at {context}" for context in contexts)
    header = ("format", "keys", "found % ± SE", "lost", "won", "McNemar p", "Δ(-ln p) ± SE", *columns)
    rows = [_needle_row(*entry) for entry in needles.items()]
    return Table("needles", "Pass keys found, in all and % at each context", header, rows)


def _needle_row(name: str, part: Json) -> Row:
    return (
        name,
        str(part["count"]),
        f"{part['found_percent']:.1f} ± {part['found_standard_error']:.1f}",
        str(part["lost"]),
        str(part["won"]),
        f"{part['p_value']:.2g}",
        _with_error(part["nll_change"], part["nll_change_standard_error"], "+.4f", ".4f"),
        *(f"{sum(row) / len(row):.0f}" for row in part["found_percent_by_context_and_depth"]),
    )


def _ablation_rows(formats: Json) -> Iterable[Row]:
    for name, figures in formats.items():
        for only, part in figures["ablations"].items():
            model = part["model"]
            cells = ("", "")
            if model:
                cells = (_kl(model), f"{model['same_top_percent']:.2f}")
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


def _distance_rows(formats: Json) -> Iterable[Row]:
    for name, figures in formats.items():
        parts = [figures["attention"]["overall"].get(metric) for metric in DISTANCE_METRICS]
        if all(parts):
            yield (name, *(f"{part['mean']:.1e}" for part in parts))


def _layer_rows(formats: Json) -> Iterable[Row]:
    for label in next(iter(formats.values()))["by_layer"]:
        cells = (figures["by_layer"][label] for figures in formats.values())
        yield (label, *((f"{cell['output_error']:.4f}", CLASSES[cell["word"]]) for cell in cells))


def _control_rows(controls: list[Json]) -> Iterable[Row]:
    for control in controls:
        state = ("passed", "good") if control["passed"] else ("FAILED", "bad")
        yield (control["name"], control["expected"], control["found"], state)


def _warning_rows(warnings: list[Json]) -> list[Row]:
    return [(warning["where"], warning["what"], warning["reason"]) for warning in warnings]
