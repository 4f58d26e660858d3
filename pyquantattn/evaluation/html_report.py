"""One HTML file that says everything: no script, no link, no file beside it; readable on a phone."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

import numpy as np

from pyquantattn.evaluation import charts
from pyquantattn.evaluation.metrics import STANDARD_ERROR_BLOCK, Floats
from pyquantattn.evaluation.record import Cost, to_text
from pyquantattn.evaluation.tables import CLASSES, Cell, Table, tables
from pyquantattn.evaluation.verdict import LAYER_RULE, MODEL_RULE

Json = dict[str, Any]
SHOWN_AS_CARDS, SHOWN_FIRST = "verdicts", "warnings"  # keys of tables
STYLE = """
body {
  margin: 0 auto; padding: 16px; max-width: 1180px;
  font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #f6f7f9;
}
* { box-sizing: border-box; }
:root { color-scheme: light; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 8px 0; }
h2 { font-size: 1.15rem; margin: 28px 0 8px; }
p { margin: 6px 0; max-width: 46rem; }
.muted { color: #555; font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 12px; }
.card, figure, .table, details { background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; padding: 12px; }
.card { border-left: 6px solid #999; }
.card h3 { margin: 0; font-size: 1.05rem; }
.card p { margin: 4px 0 0; font-size: .88rem; }
.good { border-left-color: #1a7f37; } .fair { border-left-color: #c77700; } .bad { border-left-color: #c62828; }
.word { font-weight: 700; }
.good .word, td.good { color: #1a7f37; } .fair .word, td.fair { color: #9a5b00; } .bad .word, td.bad { color: #c62828; }
td.good, td.fair, td.bad { font-weight: 600; }
.figures {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr));
  gap: 12px; align-items: start;
}
figure { margin: 0; }
figcaption { font-size: .88rem; color: #444; margin-bottom: 6px; }
figure svg { width: 100%; height: auto; display: block; }
.table { overflow-x: auto; padding: 0; }
table { border-collapse: collapse; font-size: .88rem; width: 100%; }
th, td { padding: 6px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid #eceff2; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
table.text td { white-space: normal; text-align: left; min-width: 7rem; }
table.text th { text-align: left; }
.alarm { background: #c62828; color: #fff; padding: 12px; border-radius: 8px; font-weight: 600; }
pre { overflow-x: auto; font-size: .78rem; }
summary { cursor: pointer; font-weight: 600; }
"""


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: KV cache formats</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""


def render(record: Json, kls: dict[str, list[Floats]]) -> str:
    """The report of a record; `kls` are the per-token KLDs of each format, by text (empty without a model)."""
    results, shown = record["results"], tables(record)
    name = record["inputs"]["name"]
    sections = [
        f"<h1>What a KV cache format costs: {escape(name)}</h1>",
        _introduction(record),
        _alarm(results),
        f'<div class="cards">{"".join(_cards(results))}</div>',
        *(_table(table) for table in shown if table.key == SHOWN_FIRST),
        *_figures(record, kls),
        *(_table(table) for table in shown if table.key not in (SHOWN_AS_CARDS, SHOWN_FIRST)),
        _method(bool(kls)),
        f"<details><summary>Record (report.json)</summary><pre>{escape(to_text(record))}</pre></details>",
    ]
    return PAGE.format(title=escape(name), style=STYLE, body="\n".join(sections))


def _introduction(record: Json) -> str:
    inputs, environment = record["inputs"], record["environment"]
    device = environment["gpu"] or environment["processor"]
    return (
        f"<p>{escape(inputs['description'])}</p>"
        f'<p class="muted">pyquantattn {environment["pyquantattn"]}, torch {environment["torch"]}, '
        f"{escape(str(device))}; reference: {escape(record['settings']['reference_format'])} cache on the same path; "
        f"kv_read_path=cache. The run: {escape(str(Cost(**record['measured_cost'])))}.</p>"
    )


def _alarm(results: Json) -> str:
    if results["controls_passed"]:
        return ""
    failed = ", ".join(control["name"] for control in results["controls"] if not control["passed"])
    words = f"A control failed ({failed}): these figures are not to be trusted, and there is no verdict."
    return f'<p class="alarm">{escape(words)}</p>'


def _cards(results: Json) -> Iterable[str]:
    for name, figures in results["formats"].items():
        verdict, memory = figures["verdict"], figures["memory"]
        borderline = " (borderline)" if verdict["is_borderline"] else ""
        per_gib = f", {memory['tokens_per_gib']:,.0f} tokens per GiB" if memory["tokens_per_gib"] else ""
        word = (verdict["word"] or "no verdict") + borderline
        yield (
            f'<div class="card {CLASSES[verdict["word"]]}"><h3>{escape(name)}</h3><p class="word">{word}</p>'
            f"<p>{escape(verdict['reason'])}</p><p>{memory['bits_per_value']:.3f} bits per value{per_gib}</p></div>"
        )


def _figures(record: Json, kls: dict[str, list[Floats]]) -> Iterable[str]:
    yield "<h2>Figures</h2>"
    figures = (
        f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>" for caption, svg in _drawn(record, kls)
    )
    yield f'<div class="figures">{"".join(figures)}</div>'


def _drawn(record: Json, kls: dict[str, list[Floats]]) -> Iterable[tuple[str, str]]:
    """Captions and drawings."""
    results = record["results"]
    formats, noise_kl, noise_error = results["formats"], results["noise_kl"], results["noise_output_error"]
    yield "Accuracy against memory; bars are two standard errors", charts.pareto(formats, noise_kl, noise_error)
    if kls:
        yield "The tail: tokens that moved most", charts.tail({name: np.concatenate(kl) for name, kl in kls.items()})
    yield "Error against context", charts.against_context(formats)
    if kls:
        yield "Error along the decoded text", charts.against_step(kls)
        yield "Which way probabilities moved", charts.change_fan(formats)
    if all(figures.get("needles") for figures in formats.values()):
        drawing = charts.needle_grid(formats, record["settings"]["contexts"])
        yield "Pass keys found, by depth and context", drawing
    yield (
        "Attention output error by layer (rows) and query head; K and V quantised, K only, V only",
        charts.heat_maps(formats),
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in table.rows)
    kind = "text" if table.is_text else ""
    return f'<h2>{escape(table.title)}</h2><div class="table"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def _cell(cell: Cell) -> str:
    text, kind = (cell, "") if isinstance(cell, str) else cell
    return f'<td class="{kind}">{escape(text)}</td>'


def _method(has_model: bool) -> str:
    words = f"<p>Formats: {MODEL_RULE}</p>" if has_model else ""
    return (
        f"<h2>How to read this</h2>{words}"
        f"<p>Attention alone (layers): {LAYER_RULE} The error is the L2 distance to exact attention over the original "
        "K and V, relative to its norm.</p>"
        '<p class="muted">KLD is KL(16-bit cache ‖ format) of the next-token distribution, in nats. The row of the '
        "16-bit format itself is the noise floor: the same cache, summed in another order. Standard errors come from "
        f"means over runs of {STANDARD_ERROR_BLOCK} neighbouring tokens. K only and V only write code times scale into "
        "an fp16 cache. No verdict is given when a control fails.</p>"
    )
