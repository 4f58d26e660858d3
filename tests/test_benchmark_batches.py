"""The benchmark of prefill and hybrid batches and the five sweeps: on sizes that say nothing of speed."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from benchmarking import batch_contenders, batch_tables, cpu_suite, cpu_workloads, report, sweeps
from benchmarking.batch_shapes import HybridShape, PrefillShape, parse_hybrid_shapes, parse_prefill_shapes

BENCHMARK = str(Path(__file__).resolve().parents[1] / "tools" / "benchmark.py")


def measure(shape: cpu_workloads.Shape, operation: str) -> list[dict[str, Any]]:
    options = cpu_workloads.Options(
        cpu_workloads.FORMATS[operation].split(","), list(cpu_workloads.PEERS[operation]), rounds=1
    )
    return cpu_suite.measure_shape(cpu_suite.Job(shape, options), torch.get_num_threads())


def measure_formats(shape: cpu_workloads.Shape, formats: str) -> list[dict[str, Any]]:
    options = cpu_workloads.Options(formats.split(","), [], rounds=1)
    return cpu_suite.measure_shape(cpu_suite.Job(shape, options), torch.get_num_threads())


def test_every_contender_of_a_prefill_is_right() -> None:
    """The onnxruntime peer may not be installed: then its row says so. Groups of 2, two sequences of 33 tokens."""
    rows = measure(PrefillShape(2, 4, 2, 64, 33), "prefill")
    ours = [row for row in rows if row["contender"].startswith(report.OURS)]
    assert len(ours) == 8 and report.broken_checks(rows) == []
    for row in rows:
        assert ("failure" in row and "not installed" in row["failure"]) or row["relative_error"] < 5e-3, row
    assert ours[0]["flop"] == 4 * 2 * 4 * 64 * sum(range(1, 34))


@pytest.mark.parametrize("percent", [0, 40, 100])
def test_one_call_and_separate_calls_do_the_same_rows(percent: int) -> None:
    shape = HybridShape(5, 4, 2, 64, 40, 7, percent)
    assert sum(count == 7 for count in shape.query_counts) == 5 * percent // 100
    rows = measure(shape, "hybrid")
    assert len(rows) == 6 and report.broken_checks(rows) == []


@pytest.mark.parametrize("kv_format", ["int8", "fp8_e4m3", "fp8_e5m2"])
def test_static_scales_are_those_of_the_heads(kv_format: str) -> None:
    """Static scales: K's and V's largest elements become the largest codes, and nothing else changes."""
    shape = HybridShape(3, 4, 2, 64, 40, 7, 40)
    rows = measure_formats(shape, f"{kv_format} static")
    names = [f"pyquantattn {kv_format} static", f"pyquantattn {kv_format} static separate"]
    assert [row["contender"] for row in rows] == names and report.broken_checks(rows) == []
    data = batch_contenders.BatchData.random(shape, cpu_workloads.PLACE)
    cache = batch_contenders.HybridCall(data, f"{kv_format} static").filled.caches[0]
    assert cache.k_scale is not None and cache.k_scale.shape == (2,) and not torch.equal(cache.k_scale, cache.v_scale)
    largest = data.k.abs().amax((0, 2)).double() / cache.k_scale.double()
    assert torch.allclose(largest, torch.full_like(largest, batch_contenders.LARGEST_CODES[kv_format]))


def test_16_bit_formats_have_no_static_scales() -> None:
    [row, _] = measure_formats(HybridShape(2, 4, 2, 64, 40, 7, 40), "fp16 static")
    assert row["failure"] == "fp16 static: only int8, fp8_e4m3, fp8_e5m2 have scales"


def test_a_wrong_output_is_seen() -> None:
    """Against float64 over keys that are one percent larger than those that the kernel was given."""
    data = batch_contenders.BatchData.random(PrefillShape(2, 4, 2, 64, 33), cpu_workloads.PLACE)
    contender = batch_contenders.FreshPrefill(data, "fp32")
    assert batch_contenders.relative_error(data, contender) < 1e-5
    given = contender.inputs
    contender.inputs = lambda row: (given(row)[0], given(row)[1] * 1.01, given(row)[2])  # type: ignore[method-assign]
    assert batch_contenders.relative_error(data, contender) > 1e-3


def test_shapes_come_from_sets_and_from_sizes() -> None:
    assert {shape.length for shape in parse_prefill_shapes("prefill")} == {512, 2048, 4096}
    assert parse_prefill_shapes("2:8:4:64:128") == [PrefillShape(2, 8, 4, 64, 128)]
    assert [shape.prefill_percent for shape in parse_hybrid_shapes("hybrid")] == [0, 25, 50, 75, 100]
    assert parse_hybrid_shapes("2:8:4:64:128:16:50") == [HybridShape(2, 8, 4, 64, 128, 16, 50)]
    for parse, text in ((parse_prefill_shapes, "2:8:4:64"), (parse_hybrid_shapes, "nothing")):
        with pytest.raises(ValueError, match="--shapes: an item must be the name of a set or batch:q_heads"):
            parse(text)


def row(contender: str, ms: float, shape: str = "s", **more: Any) -> dict[str, Any]:
    rates = {"gigaflop_per_second": 100 / ms, "percent_of_matrix_rate": 50 / ms}
    return {"shape": shape, "threads": 2, "contender": contender, "milliseconds": ms} | rates | more


def results(*rows: dict[str, Any]) -> report.Results:
    return report.Results({"runs": [{"rows": list(rows)}]})


def test_tables_compare_types_caches_and_calls() -> None:
    rows = [row("pyquantattn fresh fp32", 2.0), row("torch fp32", 4.0), row("pyquantattn int8", 1.0)]
    found = results(*rows, row("torch bf16", 1.0))
    assert batch_tables.prefill_table(found)[1] == [["s", "2.000 (0.50x)", "4.000", "1.000"]]
    assert batch_tables.caches_table(found)[1] == [["s", "2.000", "1.000 (0.50x)"]]
    assert batch_tables.rates_table(found)[1][0][1] == "50 (25 %)"
    both = results(*rows, row("pyquantattn int8 static", 0.5))
    assert batch_tables.caches_table(both) == (
        ["shape", "fresh fp32", "int8", "int8 static"],
        [["s", "2.000", "1.000 (0.50x)", "0.500 (0.25x)"]],
    )
    assert batch_tables.batch_losses(found) == []
    found = results(row("pyquantattn int8", 3.0), row("pyquantattn int8 separate", 2.0))
    assert batch_tables.hybrid_table(found)[1] == [["s", "3.000 (1.50x)", "2.000"]]
    assert batch_tables.batch_losses(found) == ["s, 2 thread(s): int8 3.000 ms, int8 separate 2.000 ms"]


def test_a_16_bit_output_may_have_its_rounding_and_no_more() -> None:
    fine = row("pyquantattn fresh bf16", 1.0, relative_error=4e-3, max_error=4.9e-3)
    assert report.broken_checks([fine]) == [] and len(report.broken_checks([fine | {"relative_error": 5e-3}])) == 1


@pytest.fixture(scope="module")
def sweep_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the one command writes."""
    path = tmp_path_factory.mktemp("sweeps") / "sweeps.json"
    command = [sys.executable, BENCHMARK, "--device", "cpu", "--operation", "sweeps", "--quick", "--formats", "int8"]
    options = ["--peers", "torch", "--threads", "1", "--rounds", "1", "--save", str(path)]
    environment = os.environ | {"MPLBACKEND": "Agg"}
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return path


def test_five_sweeps_are_written_as_json_csv_and_charts(sweep_files: Path) -> None:
    [run] = json.loads(sweep_files.read_text())["runs"]
    expected = {"prefill-length": 2, "prefill-batch": 2, "decode-length": 2, "decode-batch": 2, "hybrid-fraction": 5}
    assert {sweep.name: len(sweep.shapes) for sweep in sweeps.sweeps(is_quick=True)} == expected
    with sweep_files.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(run["rows"])
    for name, count in expected.items():
        mine = [line for line in lines if line["sweep"] == name and line["contender"] == "pyquantattn int8"]
        assert len({line["value"] for line in mine}) == len(mine) == count
        for line in mine:
            sizes = [r["sizes"] for r in run["rows"] if r["set"] == name]
            assert int(line["value"]) in {size[line["axis"]] for size in sizes} and float(line["milliseconds"]) > 0
    assert any(line["contender"] == "torch fp32" for line in lines)
    assert sweep_files.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_run_names_operation_and_limits(sweep_files: Path) -> None:
    found = report.Results(json.loads(sweep_files.read_text()))
    [line] = report.run_lines(found)
    assert found.runs[0]["operation"] == "sweeps" and "--operation sweeps" in line
    assert "Read bandwidth: 1 thread(s)" in line and "Matrix products in float32: 1 thread(s)" in line
