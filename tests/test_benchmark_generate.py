"""The benchmark of whole models: on sizes that say nothing of speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.3", reason="needs transformers 5.3: pip install '.[transformers]'")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from benchmarking import generate_contenders, generate_models, generate_suite, generate_tables, report
from benchmarking.results import Results

BENCHMARK = str(Path(__file__).resolve().parents[1] / "tools" / "benchmark.py")
OPTIONS = generate_suite.Options(rounds=2, steps=2)
SHAPES = [generate_models.GenerateShape("tiny", 2, 40), generate_models.GenerateShape("tiny", 1, 70)]


def run(contenders: list[generate_contenders.Contender], device: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    found = generate_suite.run(SHAPES, contenders, device, OPTIONS, lambda new, _: rows.extend(new))
    about = {"versions": {"torch": torch.__version__}, "date": "-", "commit": "-", "command": "-", "cpu": "-"}
    return {"runs": [about | {"cores": 1, "rows": rows} | found]}


def ours_and_reference(device: str) -> list[generate_contenders.Contender]:
    formats = generate_contenders.FORMATS[device].split(",")
    return generate_contenders.contenders(formats, ["dynamic", "static"], has_graphs=device == "cuda")


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return run(ours_and_reference("cpu"), "cpu")


def test_every_cache_gives_the_logits_of_the_16_bit_one(content: dict[str, Any]) -> None:
    rows = content["runs"][0]["rows"]
    assert len(rows) == 2 * 4 and report.broken_checks(rows) == []
    for row in rows:
        is_exact = row["contender"] == generate_contenders.REFERENCE
        assert (row["relative_error"] == 0) == is_exact, row
        assert row["tokens_per_second"] == pytest.approx(row["sizes"]["batch_size"] / row["milliseconds"] * 1e3)


def test_steps_captured_on_cuda_give_the_same_logits(cuda: str) -> None:
    rows = run(ours_and_reference(cuda), cuda)["runs"][0]["rows"]
    assert len(rows) == 2 * 8 and report.broken_checks(rows) == []
    assert all(row["cache_bytes"] > 0 and row["relative_error"] < 0.2 for row in rows)


def test_attention_without_a_mask_is_that_of_a_single_token() -> None:
    """What a captured step of a growing cache runs."""
    dynamic = generate_contenders.contenders([], ["dynamic"], has_graphs=False)[0]
    maskless = generate_contenders.Contender("maskless", generate_contenders.MASKLESS, dynamic.make_cache)
    rows = run([dynamic, maskless], "cpu")["runs"][0]["rows"]
    assert all(row["relative_error"] < 1e-5 for row in rows)


def test_tokens_that_are_skipped_lie_between_the_first_step_and_the_others() -> None:
    model = generate_models.make_model("tiny", "cpu")
    for contender in generate_contenders.contenders(["int8"], ["dynamic"], has_graphs=False):
        with torch.inference_mode():
            steps = generate_suite.Steps(model, contender, SHAPES[0], 90, 0)
            steps()
            steps.skip(7)
            steps()
        assert steps.cache.get_seq_length() == 40 + 1 + 7 + 1 == int(steps.positions)


def test_a_wrong_cache_is_seen() -> None:
    """Values that are twice as large as they should be."""
    honest = generate_contenders.ours("int8", is_graph=False)

    def make_cache(config: Any, length: int) -> Any:
        cache = honest.make_cache(config, length)
        put = cache.update
        cache.update = lambda k, v, *rest: put(k, 2 * v, *rest)
        return cache

    wrong = generate_contenders.Contender(honest.name, honest.attention, make_cache)
    reference = generate_contenders.contenders([], ["dynamic"], has_graphs=False)
    rows = run([*reference, wrong], "cpu")["runs"][0]["rows"]
    assert len(report.broken_checks(rows)) == len(SHAPES)


def test_who_cannot_run_is_said_and_stops_nobody() -> None:
    def make_cache(_config: Any, _length: int) -> Any:
        raise MemoryError("no room")

    broken = generate_contenders.Contender("broken", "sdpa", make_cache)
    content = run([*generate_contenders.contenders([], ["dynamic"], has_graphs=False), broken], "cpu")
    results = Results(content)
    assert generate_tables.failure_lines(results)[0] == "broken, tiny 2 x 40: MemoryError: no room"
    assert results.row("tiny 2 x 40", torch.get_num_threads(), generate_contenders.REFERENCE) is not None


def test_tables_have_a_row_for_each_shape(content: dict[str, Any]) -> None:
    results = Results(content)
    head, body = generate_tables.speed_table(results, is_graph=False)
    assert head[1:3] == [generate_contenders.REFERENCE, "pyquantattn int8"] and head[-1].startswith("int8 against")
    assert [cells[0] for cells in body] == ["tiny 1 x 70", "tiny 2 x 40"] and body[0][-1].endswith("x")
    assert len(generate_tables.memory_table(results)[1]) == 2
    assert "turns of 2 steps" in generate_tables.run_lines(results)[0]


def test_shapes_come_from_sets_and_from_sizes() -> None:
    assert generate_models.parse_shapes("tiny:2:40,generate-cpu")[0] == SHAPES[0]
    assert all(generate_models.set_of(shape) == "generate-gpu" for shape in generate_models.SETS["generate-gpu"])
    for text in ("tiny:2", "tiny:0:8", "other:1:8", "tiny:1:x"):
        with pytest.raises(ValueError, match="must be a set or model:batch:context"):
            generate_models.parse_shapes(text)


def test_the_command_writes_results_and_a_chart(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARK, "--operation", "generate", "--device", "cpu"]
    options = [
        "--quick",
        "--rounds",
        "1",
        "--peers",
        "dynamic",
        "--formats",
        "int8",
        "--save",
        str(tmp_path / "r.json"),
    ]
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads((tmp_path / "r.json").read_text())
    assert {row["contender"] for row in content["runs"][0]["rows"]} == {"DynamicCache, SDPA", "pyquantattn int8"}
    assert (tmp_path / "r.png").stat().st_size > 0
