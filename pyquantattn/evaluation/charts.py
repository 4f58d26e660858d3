"""The plots of the report, as SVG text that needs nothing beside it.

Figures are narrow, so that their letters stay readable on a phone.
"""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from pyquantattn.evaluation.metrics import Floats, standard_error

Json = dict[str, Any]
# Okabe & Ito: told apart by readers with any colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A7A00")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pyquantattn",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "legend.fontsize": 8.0,
}
WIDTH = 3.7  # inches
LEAST_KL = 1e-12  # rounding leaves KLDs of equal predictions at 0 or below, which a logarithm does not show
MOST_LAYER_LABELS = 16  # more do not fit beside a heat map
BAR_LABELS = 4  # below a colour bar
DARK_BELOW = 60  # per cent: where the colour map needs white letters
STEP_BIN = 128  # positions that share one point of the curve over decode steps


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(rows * columns)]


def _make_logarithmic(axis: Axes, *names: str) -> None:
    """Also where there is nothing to show (every value is NaN), for which matplotlib finds no limits."""
    for name in names:
        if not np.isfinite(getattr(axis.dataLim, f"minpos{name}")):
            axis.set(**{f"{name}lim": (LEAST_KL, 1.0)})
        axis.set(**{f"{name}scale": "log"})


def _legend(figure: Figure, axis: Axes) -> None:
    """Above the drawing, where it hides no curve."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2)


def pareto(formats: Json, noise_kl: float | None, noise_error: float) -> str:
    """Bits per value against mean KLD and its 99th percentile; without a model, against the output error."""
    with matplotlib.rc_context(STYLE):
        has_model = noise_kl is not None
        panels = (("mean", "kl_mean"), ("99th percentile", "kl_p99")) if has_model else (("mean", "mean"),)
        figure, axes = _figure(2.6 * len(panels), rows=len(panels))
        for axis, (title, key) in zip(axes, panels, strict=True):
            for index, (name, figures) in enumerate(formats.items()):
                part = figures["model"]["overall"] if has_model else figures["attention"]["overall"]["output_error"]
                error = 2 * part["kl_standard_error"] if key == "kl_mean" else None
                axis.errorbar(
                    figures["memory"]["bits_per_value"],
                    max(part[key], LEAST_KL),
                    yerr=error,
                    fmt="o",
                    capsize=3,
                    color=_colour(index),
                    label=name,
                )
            axis.axhline(
                noise_kl if noise_kl is not None else noise_error,
                color="#777777",
                linestyle="--",
                linewidth=1,
                label="noise floor (mean)",
            )
            _make_logarithmic(axis, "y")
            axis.set_ylabel(f"KLD, {title} (nats)" if has_model else "output error, mean")
        axes[-1].set_xlabel("bits per value, scales and padding included")
        _legend(figure, axes[0])
        return _svg(figure)


def tail(kls: dict[str, Floats]) -> str:
    """Share of tokens whose KLD is above a value."""
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _figure(2.8)
        for index, (name, kl) in enumerate(kls.items()):
            ordered = np.sort(np.maximum(kl, LEAST_KL))
            share = 1.0 - np.arange(len(ordered)) / len(ordered)
            chosen = np.unique(np.geomspace(1, len(ordered), 200).astype(int))  # dense in the tail
            axis.plot(ordered[-chosen], share[-chosen], color=_colour(index), label=name)
        _make_logarithmic(axis, "x", "y")
        axis.set(xlabel="KLD (nats)", ylabel="share of tokens above")
        _legend(figure, axis)
        return _svg(figure)


def against_context(formats: Json) -> str:
    """Mean KLD of each context bucket with two standard errors, or the output error without a model."""
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _figure(2.8)
        contexts: list[int] = []
        for index, (name, figures) in enumerate(formats.items()):
            if "model" in figures:
                parts = {int(key): part for key, part in figures["model"]["by_context"].items() if part["count"]}
                errors = [2 * part["kl_standard_error"] for part in parts.values()]
                values = [max(part["kl_mean"], LEAST_KL) for part in parts.values()]
                contexts = list(parts)
                axis.errorbar(
                    contexts,
                    values,
                    yerr=errors,
                    capsize=3,
                    marker="o",
                    markersize=4,
                    color=_colour(index),
                    label=name,
                )
            else:
                curve = {int(key): value for key, value in figures["attention"]["by_context"].items()}
                contexts = list(curve)
                axis.plot(contexts, list(curve.values()), marker="o", markersize=4, color=_colour(index), label=name)
        _make_logarithmic(axis, "x", "y")
        axis.set_xlabel("context, up to (tokens)")
        axis.set_xticks(contexts, [str(context) for context in contexts])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_ylabel(
            "mean KLD (nats)" if any("model" in figures for figures in formats.values()) else "mean output error"
        )
        _legend(figure, axis)
        return _svg(figure)


def against_step(kls: dict[str, list[Floats]]) -> str:
    """Mean KLD along the text: errors that accumulate would rise."""
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _figure(2.8)
        for index, (name, texts) in enumerate(kls.items()):
            table = np.stack(texts)
            firsts = range(0, table.shape[1], STEP_BIN)
            values = [max(float(table[:, first : first + STEP_BIN].mean()), LEAST_KL) for first in firsts]
            errors = [2 * standard_error(table[:, first : first + STEP_BIN].flatten()) for first in firsts]
            middle = [first + STEP_BIN / 2 for first in firsts]
            axis.errorbar(
                middle,
                values,
                yerr=np.nan_to_num(errors),
                color=_colour(index),
                label=name,
                linewidth=1,
                elinewidth=0.6,
            )
        _make_logarithmic(axis, "y")
        axis.set(xlabel="decode step", ylabel="mean KLD (nats)")
        _legend(figure, axis)
        return _svg(figure)


def change_fan(formats: Json) -> str:
    """Percentiles of the change of the right token's probability: symmetric is noise, lopsided is damage."""
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _figure(0.9 + 0.45 * len(formats))
        bands = ((0.1, 99.9, 0.25), (1, 99, 0.35), (5, 95, 0.5), (25, 75, 0.9))
        for index, figures in enumerate(formats.values()):
            overall = figures["model"]["overall"]
            for low, high, alpha in bands:
                left, right = overall[f"p_change_p{low:g}"], overall[f"p_change_p{high:g}"]
                axis.barh(index, right - left, left=left, height=0.6, color=_colour(index), alpha=alpha, linewidth=0)
        axis.axvline(0, color="#333333", linewidth=0.8)
        axis.set_yticks(range(len(formats)), list(formats))
        axis.set_xscale("symlog", linthresh=0.1)
        axis.invert_yaxis()
        axis.set_xlabel("change of the right token's probability\n(points; bands 50, 90, 98, 99.8 %)")
        return _svg(figure)


def needle_grid(formats: Json, contexts: list[int]) -> str:
    """Share of pass keys found, of every context and depth: a map for each format."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = _figure(0.8 + 1.3 * ((len(formats) + 1) // 2), rows=(len(formats) + 1) // 2, columns=2)
        for axis in axes[len(formats) :]:
            axis.axis("off")
        for axis, (name, figures) in zip(axes, formats.items(), strict=False):
            needles = figures["needles"]
            table = np.array(needles["found_percent_by_context_and_depth"])
            image = axis.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=100)
            for place, value in np.ndenumerate(table):
                colour = "black" if value > DARK_BELOW else "white"
                axis.text(place[1], place[0], f"{value:.0f}", ha="center", va="center", color=colour, fontsize=7)
            axis.set_title(name, fontsize=STYLE["font.size"])
            axis.set_xticks(range(table.shape[1]), [f"{100 * depth:g}" for depth in needles["depths"]])
            axis.set_yticks(range(table.shape[0]), [str(context) for context in contexts])
        axes[0].set(xlabel="depth of the key (%)", ylabel="context")
        figure.colorbar(image, ax=axes, label="found %", location="bottom", shrink=0.8)
        return _svg(figure)


def heat_maps(formats: Json) -> str:
    """Mean output error of every layer and query head: a row of maps for each format, one colour scale."""
    columns = ("both", "K", "V") if any(figures["ablations"] for figures in formats.values()) else ("both",)
    tables = {(name, column): _heat(figures, column) for name, figures in formats.items() for column in columns}
    values = np.concatenate([np.ravel(table) for table in tables.values() if table is not None])
    positive = values[values > 0]
    norm = LogNorm(float(positive.min()), float(positive.max())) if len(np.unique(positive)) > 1 else None
    labels = list(next(iter(formats.values()))["by_layer"])
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        height = 0.5 + max(0.9, min(3.0, 0.16 * len(labels)))
        figure, axes = _figure(height * len(formats), rows=len(formats), columns=len(columns))
        for axis, ((name, column), table) in zip(axes, tables.items(), strict=True):
            if table is None:
                axis.axis("off")
                continue
            image = axis.imshow(np.array(table), aspect="auto", cmap="viridis", norm=norm)
            axis.set_title(name if column == "both" else f"{column} only", fontsize=STYLE["font.size"])
            is_left, is_short = column == "both", len(labels) <= MOST_LAYER_LABELS
            axis.set_yticks(range(len(labels)) if is_short else [], labels if is_left and is_short else None)
            axis.xaxis.set_major_locator(MaxNLocator(3, integer=True))
            axis.tick_params(labelleft=is_left)
        axes[-len(columns)].set(xlabel="query head", ylabel="layer")
        bar = figure.colorbar(image, ax=axes, label="mean output error", location="bottom", shrink=0.8)
        if norm is not None:  # matplotlib would label so many values of a short range that they overlap
            labelled = np.geomspace(positive.min(), positive.max(), BAR_LABELS).tolist()
            bar.set_ticks(labelled, labels=[f"{value:.2g}" for value in labelled])
            bar.minorticks_off()
        return _svg(figure)


def _heat(figures: Json, column: str) -> list[list[float]] | None:
    """Of K and V together, or of one alone where that was measured."""
    if column == "both":
        found: list[list[float]] = figures["attention"]["by_layer_and_head"]
        return found
    return figures["ablations"][column]["by_layer_and_head"] if column in figures["ablations"] else None
