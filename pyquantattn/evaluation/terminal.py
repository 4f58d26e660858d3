"""The run on a terminal: progress bars and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pyquantattn.evaluation.verdict import DO_NOT_USE, INDISTINGUISHABLE, LAYER_RULE, MODEL_RULE, VISIBLE

Json = dict[str, Any]
LEFT = ("format", "layer", "verdict")
COLOURS = {INDISTINGUISHABLE: "green", VISIBLE: "yellow", DO_NOT_USE: "red", None: "magenta"}


class TerminalProgress:
    """One bar for each stage, with the time left."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """See run.Progress."""
        columns = (TextColumn("{task.description:24}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console) as progress:
            task = progress.add_task(name, total=total)
            yield lambda count: progress.advance(task, count)


def print_record(console: Console, record: Json) -> None:
    """Controls, warnings, then the formats."""
    results = record["results"]
    _print_controls(console, results)
    for concern in results["warnings"]:
        console.print(f"[yellow]warning[/] {concern['where']}: {concern['what']}: {concern['reason']}", highlight=False)
    if any("model" in figures for figures in results["formats"].values()):
        console.print(_model_table(record))
        console.print(_memory_table(record))
    console.print(_layer_table(results))


def _print_controls(console: Console, results: Json) -> None:
    table = Table(title="Controls", title_justify="left")
    for column in ("control", "expected", "found", ""):
        table.add_column(column, overflow="fold")
    for control in results["controls"]:
        state = "[green]passed[/]" if control["passed"] else "[bold red]FAILED[/]"
        table.add_row(control["name"], control["expected"], control["found"], state)
    console.print(table)
    if not results["controls_passed"]:
        console.print(
            "[bold red]A control failed: the figures below are not to be trusted, and there is no verdict.[/]"
        )


def _model_table(record: Json) -> Table:
    title = f"{record['inputs']['name']}: teacher-forced decode through the cache (kv_read_path=cache)"
    table = _table(title, "format", "KLD mean", "± SE", "KLD p99", "same top-1 %", "verdict")
    for name, figures in record["results"]["formats"].items():
        overall = figures["model"]["overall"]
        table.add_row(
            name,
            f"{overall['kl_mean']:.1e}",
            f"{overall['kl_standard_error']:.0e}",
            f"{overall['kl_p99']:.1e}",
            f"{overall['same_top_percent']:.2f} ± {overall['same_top_standard_error']:.2f}",
            word_markup(figures["verdict"]),
        )
    table.caption = MODEL_RULE
    return table


def _memory_table(record: Json) -> Table:
    columns = ("format", "bits per value", "tokens per GiB", "greedy agreement", "attention ms/step")
    table = _table("Memory and time", *columns)
    for name, figures in record["results"]["formats"].items():
        memory, greedy = figures["memory"], figures["greedy"]
        table.add_row(
            name,
            f"{memory['bits_per_value']:.3f}",
            f"{memory['tokens_per_gib']:,.0f}",
            f"{100 * greedy['agreeing_tokens'] / greedy['counted_tokens']:.2f} %"
            if greedy and greedy["counted_tokens"]
            else "",
            f"{1e3 * record['measured_times'][name]:.2f}",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    """Columns of texts and of figures, which stand to the right."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in LEFT else "right")
    return table


def _layer_table(results: Json) -> Table:
    formats = results["formats"]
    table = _table("Attention output error, worst context of each layer", "layer", *formats)
    for label in next(iter(formats.values()))["by_layer"]:
        cells = []
        for figures in formats.values():
            cell = figures["by_layer"][label]
            cells.append(f"[{COLOURS[cell['word']]}]{cell['output_error']:.4f}[/]")
        table.add_row(label, *cells)
    table.caption = LAYER_RULE
    return table


def word_markup(verdict: Json) -> str:
    """A verdict's word in its colour."""
    word = verdict["word"]
    return f"[{COLOURS[word]}]{word or 'no verdict'}[/]" + (" (borderline)" if verdict["is_borderline"] else "")
