"""A record as Markdown: report.md, and the marked tables of a document.

A marker is a line ``<!-- accuracy RECORD TABLE -->``, with a record's path relative to the document and a table's key;
what stands between it and ``<!-- end -->`` is rewritten.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from pyquantattn.evaluation.tables import Json, Table, tables, text_of

_MARKED = re.compile(r"(<!-- accuracy (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table_to_markdown(table: Table) -> str:
    """
    >>> print(table_to_markdown(Table("bits", "Bits", ("format", "bits"), [("int8", "8.125")])))
    | format | bits |
    | --- | --- |
    | int8 | 8.125 |
    """
    rows = [table.header, ("---",) * len(table.header), *(tuple(text_of(cell) for cell in row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def report(record: Json) -> str:
    """Every table under its title."""
    inputs = record["inputs"]
    head = f"# What a KV cache format costs: {inputs['name']}\n\n{inputs['description']}\n"
    return "\n".join([head, *(f"## {table.title}\n\n{table_to_markdown(table)}\n" for table in tables(record))])


def render_document(document: Path) -> int:
    """Rewrites every marked table of a document from the records they name; returns how many there are.

    Raises:
        ValueError: a marker names a table that its record does not have.
    """

    def table(match: re.Match[str]) -> str:
        begin, file, key, end = match.groups()
        found = {table.key: table for table in tables(json.loads((document.parent / file).read_text()))}
        if key not in found:
            raise ValueError(f"evaluate: a marker must name one of {', '.join(found)}, got {key!r} in {document}")
        return f"{begin}{table_to_markdown(found[key])}\n{end}"

    text, count = _MARKED.subn(table, document.read_text())
    document.write_text(text)
    return count
