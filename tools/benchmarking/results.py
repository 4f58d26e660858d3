"""The rows of a results file, and what every table of them is made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

OURS = "pyquantattn "
EIGHT_BIT = ("int8", "fp8_e4m3", "fp8_e5m2")
FRESH = "fresh "  # before the name of a type: K and V as the model computed them, no cache
STATIC = " static"  # after the name of a format: one scale for each KV head, not one for each of its tokens
LARGE_STEP_BYTES = 100e6  # from here on a step's fixed cost is small
MAX_KERNEL_ERROR = 1e-3  # of this library, against float64 on the dequantised cache
ACCURATE_ERROR = 5e-3  # 16-bit arithmetic stays below, an 8-bit query does not


class Results:
    """The rows of one results file, by shape, threads and contender; a later run's row replaces an earlier one's.

    Rows of a GPU have no threads (0 here) and name the set that their shape belongs to; `chosen` keeps one set.
    """

    def __init__(self, content: dict[str, Any], chosen: str = "") -> None:
        self.runs: list[dict[str, Any]] = content["runs"]
        self.is_gpu = any("gpu" in run for run in self.runs)
        self.rows: dict[tuple[str, int, str], Row] = {}
        for run in self.runs:
            for row in run["rows"]:
                if not chosen or row.get("set") == chosen:
                    self.rows[row["shape"], row.get("threads", 0), row["contender"]] = row

    @classmethod
    def load(cls, path: Path, chosen: str = "") -> Results:
        return cls(json.loads(path.read_text()), chosen)

    def time(self, row: Row) -> str:
        """Microseconds on a GPU, milliseconds on a CPU."""
        return f"{row['milliseconds'] * 1e3:.1f}" if self.is_gpu else f"{row['milliseconds']:.3f}"

    def shapes(self) -> list[str]:
        return list(dict.fromkeys(shape for shape, _, _ in self.rows))

    def threads(self) -> list[int]:
        return sorted({threads for _, threads, _ in self.rows}) or [0]

    def row(self, shape: str, threads: int, contender: str) -> Row | None:
        """The measured row; None where there is none or the contender could not run."""
        row = self.rows.get((shape, threads, contender))
        return None if row is None or "failure" in row else row

    def ours(self, shape: str, threads: int, kv_format: str) -> Row | None:
        return self.row(shape, threads, OURS + kv_format)

    def best_peer(self, shape: str, threads: int, name: str = "") -> Row | None:
        """The fastest peer with `name` in its name; on a GPU, only one whose output is accurate unless it is named."""
        peers = [
            row
            for key, row in self.rows.items()
            if key[:2] == (shape, threads) and "failure" not in row and not key[2].startswith(OURS) and name in key[2]
        ]
        if self.is_gpu and not name:
            peers = [row for row in peers if row["relative_error"] <= ACCURATE_ERROR]
        return min(peers, key=lambda row: row["milliseconds"], default=None)

    def contenders(self) -> list[str]:
        return list(dict.fromkeys(contender for _, _, contender in self.rows))


def cell(row: Row | None, text: Callable[[Row], str]) -> str:
    return "-" if row is None else text(row)


def markdown(table: Table) -> str:
    head, body = table
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
