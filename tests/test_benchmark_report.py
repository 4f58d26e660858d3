"""The benchmark's report: what it makes of rows, on data made up here; nothing is measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from benchmarking import cuda_shapes, report


def row(contender: str, us: float, error: float = 1e-4, shape: str = "s", **more: Any) -> dict[str, Any]:
    """A GPU row of 200 MB whose floor is 100 us."""
    times = {"milliseconds": us / 1e3, "floor_milliseconds": 0.1, "percent_of_read_bandwidth": 1e4 / us}
    about = {"shape": shape, "set": "models", "contender": contender, "cache_bytes": 200_000_000}
    return about | times | {"relative_error": error} | more


def results(*rows: dict[str, Any], chosen: str = "") -> report.Results:
    run = {"gpu": "G", "cuda": "13", "command": "c", "date": "d", "commit": "h", "versions": {}, "rows": list(rows)}
    limits = {"read_bandwidth_gigabytes_per_second": {"0": {"read kernel": 2.0}}, "fixed_microseconds": 1.6}
    return report.Results({"runs": [run | limits | {"eager_call_microseconds": 5.0}]}, chosen)


def test_an_inaccurate_peer_is_not_the_fastest_unless_it_is_named() -> None:
    found = results(row("FlashInfer e4m3 tc", 120.0), row("XQA e4m3", 110.0, error=4e-2))
    assert found.best_peer("s", 0)["contender"] == "FlashInfer e4m3 tc"
    assert found.best_peer("s", 0, "XQA")["contender"] == "XQA e4m3"


@pytest.mark.parametrize(("us", "reached"), [(105.0, "3 of 3"), (107.3, "2 of 3"), (130.0, "0 of 3")])
def test_targets_count_what_is_reached(us: float, reached: str) -> None:
    peers = (row("FlashInfer e4m3 tc", 120.0), row("XQA e4m3", 107.0, error=4e-2))
    _, body = report.targets_table(results(row("pyquantattn int8", us), *peers))
    assert body[0][-1] == reached


def test_losses_name_the_faster_peer_in_microseconds() -> None:
    found = report.losses(results(row("pyquantattn int8", 130.0), row("FlashInfer e4m3 tc", 120.0)))
    assert found == ["s: int8 130.0 us, FlashInfer e4m3 tc 120.0 us"]


def test_rows_of_one_set_alone() -> None:
    rows = (row("pyquantattn int8", 1.0), row("pyquantattn int8", 2.0, shape="t", set="ragged"))
    assert results(*rows, chosen="ragged").shapes() == ["t"]


def test_wrong_output_and_failures_of_ours_are_broken_and_those_of_peers_are_not() -> None:
    failed = {"shape": "s", "contender": "pyquantattn int8", "failure": "boom"}
    rows = [row("pyquantattn fp16", 1.0, error=float("nan")), failed, row("XQA e4m3", 1.0, error=4e-2)]
    assert len(report.broken_checks(rows)) == 2


def test_render_fills_the_marked_view(tmp_path: Path) -> None:
    found = results(row("pyquantattn int8", 130.0), row("FlashInfer e4m3 tc", 120.0))
    (tmp_path / "r.json").write_text(json.dumps({"runs": found.runs}))
    document = tmp_path / "d.md"
    document.write_text("<!-- benchmark r.json peers@models -->\nold\n<!-- end -->\n")
    assert report.render_document(document, tmp_path) == 1
    assert "| s | 100.0 | 130.0 (1.30x) | - | - | 120.0 FlashInfer e4m3 tc | 0.92x |" in document.read_text()


def test_shapes_come_from_sets_and_from_sizes() -> None:
    named = cuda_shapes.parse_shapes("ragged")
    assert {name for name, _ in named} == {"ragged"} and all(shape.cv == 1.0 for _, shape in named)
    [(name, shape)] = cuda_shapes.parse_shapes("4:32:8:64:1024:32")
    assert (name, shape.batch_size, shape.head_dim, shape.kv_len, shape.page_size) == ("own", 4, 64, 1024, 32)
    with pytest.raises(ValueError, match="--shapes: an item must be one of"):
        cuda_shapes.parse_shapes("nothing")
