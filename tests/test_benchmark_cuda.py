"""The CUDA benchmark of prefill and hybrid batches: what needs no GPU, on the host's clock, and one run on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import benchmark
from benchmarking import (
    batch_shapes,
    cuda_batch_peers,
    cuda_batches,
    cuda_decode,
    cuda_shapes,
    cuda_suite,
    cuda_timing,
    report,
    sweeps,
)
from benchmarking.batch_contenders import BatchData, HybridCall, Place
from benchmarking.batch_shapes import HybridShape, PrefillShape
from benchmarking.cuda_contenders import attempt

import pyquantattn

BENCHMARK = str(Path(__file__).resolve().parents[1] / "tools" / "benchmark.py")
ON_CPU = Place("cpu", torch.float16, num_copies=lambda _: 2, num_fresh_copies=lambda _: 3)


class HostReplay:
    """What Replay does on a GPU, by calls on the host."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.calls, self.num_calls = calls, len(calls)

    def milliseconds(self) -> float:
        start = time.perf_counter()
        for call in self.calls:
            call()
        return (time.perf_counter() - start) * 1e3


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_batches, "PLACE", ON_CPU)
    monkeypatch.setattr(cuda_timing, "Replay", HostReplay)


def measure(shape: PrefillShape | HybridShape, operation: str, peers: Sequence[str] = ()) -> list[dict[str, Any]]:
    options = cuda_suite.Options(cuda_suite.FORMATS[operation].split(","), list(peers))
    return cuda_batches.measure_shape(shape, options, matrix_rate=1000.0)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize(("is_causal", "cv"), [(True, 0.0), (False, 0.0), (True, 1.0)])
def test_our_contenders_of_a_prompt_are_right(is_causal: bool, cv: float) -> None:
    shape = PrefillShape(3, 4, 2, 64, 33, is_causal, cv)
    rows = measure(shape, "prefill")
    assert len(rows) == 8 and report.broken_checks(rows) == []
    for row in rows:
        assert row["fastest_turn"] <= row["milliseconds"] <= row["slowest_turn"] and row["variant"]
        assert row["gigaflop_per_second"] == pytest.approx(shape.flop / row["milliseconds"] / 1e6, rel=0.01, abs=0.1)
        assert row["percent_of_matrix_rate"] == pytest.approx(row["gigaflop_per_second"] / 10, abs=0.06)


@pytest.mark.usefixtures("on_host")
def test_hybrid_batches_are_compared_with_separate_calls() -> None:
    rows = measure(HybridShape(4, 4, 2, 64, 40, 7, 50), "hybrid")
    names = ["int8", "int8 separate", "fp8_e4m3", "fp8_e4m3 separate", "fp16", "fp16 separate"]
    assert [row["contender"] for row in rows] == [f"pyquantattn {name}" for name in names]
    assert report.broken_checks(rows) == []


@pytest.mark.usefixtures("on_host")
def test_a_peer_that_cannot_run_says_why_and_the_others_are_measured() -> None:
    """cuDNN serves no CPU tensors, torch's flash kernel does."""
    rows = {row["contender"]: row for row in measure(PrefillShape(2, 4, 4, 64, 33), "prefill", ["torch"])}
    assert rows["torch flash fp16"]["relative_error"] < 5e-3
    assert "RuntimeError" in rows["torch cuDNN fp16"]["failure"]
    assert rows["pyquantattn int8"]["milliseconds"] > 0


def test_every_contender_gets_its_turn_in_every_round() -> None:
    order: list[str] = []
    replays = [HostReplay([lambda name=name: order.append(name)]) for name in "ABC"]
    turns = cuda_timing.interleaved_microseconds(replays, budget_ms=1e-6)
    assert "".join(order) == "ABC" * 6 and [len(turn) for turn in turns] == [5, 5, 5]


def test_flop_are_those_of_visible_pairs() -> None:
    """Against masks drawn in full."""
    for shape in (PrefillShape(3, 8, 2, 64, 20, cv=1.0), PrefillShape(2, 8, 2, 64, 9, is_causal=False)):
        pairs = sum(n * (n + 1) // 2 if shape.is_causal else n * n for n in shape.kv_lens)
        assert shape.flop == 4 * 8 * 64 * pairs
    hybrid = HybridShape(2, 8, 2, 64, 10, 3, 50)
    assert hybrid.query_counts == [1, 3] and hybrid.flop == 4 * 8 * 64 * (10 + 8 + 9 + 10)


def test_ragged_prompts_have_the_tokens_of_uniform_ones() -> None:
    for shape in batch_shapes.PREFILL_SETS["prefill-ragged"]:
        assert abs(sum(shape.kv_lens) - shape.batch_size * shape.length) <= shape.batch_size
        assert len(set(shape.kv_lens)) > shape.batch_size // 2 and "ragged CV 1" in shape.label


def test_default_sets_parse() -> None:
    prompts = batch_shapes.parse_prefill_shapes(batch_shapes.DEFAULT_SETS["cuda", "prefill"])
    batches = batch_shapes.parse_hybrid_shapes(batch_shapes.DEFAULT_SETS["cuda", "hybrid"])
    assert len({shape.label for shape in prompts}) == len(prompts) and {256, 128, 64} <= {s.head_dim for s in prompts}
    assert {batch_shapes.set_of(shape) for shape in batches} == {"hybrid-serving", "hybrid-serving-mha"}
    assert len(sweeps.cuda_sweeps()) == 5
    assert [one.name for one in sweeps.cuda_sweeps()] == [one.name for one in sweeps.sweeps()]


def chosen_peers(shape: PrefillShape | HybridShape, chosen: list[str]) -> set[str]:
    small = {"kv_len": 16, "chunk": 4} if isinstance(shape, HybridShape) else {"length": 16}
    data = BatchData.random(replace(shape, **small, batch_size=2), ON_CPU)
    return set(cuda_batch_peers.peers_of(data, shape, chosen))


def test_peers_are_chosen_by_what_they_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, batch = PrefillShape(4, 32, 8, 128, 4096), HybridShape(4, 32, 8, 128, 512, 64, 50)
    torch_fused, fa2, fa3 = {"torch flash fp16", "torch cuDNN fp16"}, "FlashInfer fa2 fp16", "FlashInfer fa3 fp16"
    paged = {f"{fa2} paged", f"{fa3} paged", "FlashInfer fa2 e4m3 paged"}
    monkeypatch.setattr(cuda_batch_peers, "missing", lambda chosen: {"flashinfer": "not installed"})
    assert chosen_peers(prompt, ["torch", "flashinfer", "fa3"]) == torch_fused
    monkeypatch.setattr(cuda_batch_peers, "missing", lambda chosen: {})
    assert chosen_peers(prompt, ["torch", "flashinfer", "fa3"]) == torch_fused | {fa2, fa3} | paged
    assert chosen_peers(batch, ["flashinfer"]) == {f"{fa2} paged", "FlashInfer fa2 e4m3 paged"}
    assert chosen_peers(batch, ["fa3"]) == {f"{fa3} paged"} and chosen_peers(prompt, []) == set()
    assert chosen_peers(batch, ["pod"]) == {"FlashInfer pod fp16 paged"}
    assert chosen_peers(replace(batch, prefill_percent=100), ["pod"]) == set()
    assert chosen_peers(PrefillShape(4, 32, 8, 128, 64, cv=1.0), ["torch"]) == {"torch varlen fp16"}
    assert chosen_peers(PrefillShape(4, 32, 8, 256, 64), ["flashinfer"]) == set()  # it would compile for a minute


def jobs(monkeypatch: pytest.MonkeyPatch, *options: str) -> list[cuda_suite.Job]:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", "cuda", *options])
    return benchmark.cuda_jobs(benchmark.parse_arguments())


def test_a_run_measures_the_sets_of_its_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = jobs(monkeypatch, "--operation", "prefill")
    assert list(dict.fromkeys(job.set for job in prompts)) == batch_shapes.DEFAULT_SETS["cuda", "prefill"].split(",")
    assert prompts[0].options == cuda_suite.Options(
        cuda_suite.FORMATS["prefill"].split(","), ["torch", "flashinfer", "fa3"]
    )
    [own] = jobs(
        monkeypatch, "--operation", "hybrid", "--shapes", "2:8:2:64:128:16:50", "--formats", "int8", "--peers", ""
    )
    assert own == cuda_suite.Job(HybridShape(2, 8, 2, 64, 128, 16, 50), cuda_suite.Options(["int8"], []), "")
    assert {job.set for job in jobs(monkeypatch, "--operation", "sweeps")} == {one.name for one in sweeps.sweeps()}
    assert {job.set for job in jobs(monkeypatch)} == set(cuda_shapes.SETS)
    with pytest.raises(ValueError, match="--peers: a peer must be one of flashinfer, fa3, pod, got xqa"):
        jobs(monkeypatch, "--operation", "hybrid", "--peers", "xqa")


@pytest.mark.usefixtures("on_host")
def test_a_run_prints_saves_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_suite, "describe_device", lambda: {"gpu": "G", "cuda": "13"})
    monkeypatch.setattr(cuda_timing, "matrix_rate", lambda: {"torch mm fp16": 1000.0})
    monkeypatch.setattr(cuda_decode, "eager_microseconds", lambda: {"decode_attention": 5.0, "torch add_": 4.0})
    monkeypatch.setattr(benchmark, "console", Console(width=130))
    options = ["--operation", "hybrid", "--shapes", "2:4:2:64:40:7:50", "--formats", "int8", "--peers", ""]
    path = tmp_path / "hybrid.json"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", "cuda", *options, "--save", str(path)])
    rows = benchmark.measure(benchmark.parse_arguments(), "cuda")
    benchmark.plot(path)
    [run] = json.loads(path.read_text())["runs"]
    assert run["rows"] == rows and run["matrix_rate_gigaflop_per_second"] == {"0": {"torch mm fp16": 1000.0}}
    assert "TFLOP/s" in (shown := capsys.readouterr().out) and "pyquantattn int8 separate" in shown
    assert path.with_suffix(".png").exists() and not (tmp_path / "hybrid-floor.png").exists()


def test_page_lists_are_flashinfers_page_table() -> None:
    data = BatchData.random(PrefillShape(3, 2, 1, 64, 40, cv=1.0), ON_CPU)
    filled = HybridCall(data, "fp16").filled
    begins, pages, last = cuda_batch_peers.page_lists(filled, range(3))
    assert filled.page_table is not None and sorted(pages.tolist()) == list(range(sum(filled.page_counts)))
    for row, length in enumerate(data.kv_lens):
        mine = pages[begins[row] : begins[row + 1]]
        assert mine.tolist() == filled.page_table[row, : filled.page_counts[row]].tolist()
        assert (len(mine) - 1) * filled.page_size + last[row] == length


def test_attempt_gives_the_reason() -> None:
    def broken() -> None:
        raise ValueError("no\nsuch  thing")

    assert attempt(broken) == {"failure": "ValueError: no such thing"} and attempt(lambda: 3) == 3


def row(contender: str, ms: float, shape: str = "s", error: float = 3e-4, **more: Any) -> dict[str, Any]:
    rates = {"gigaflop_per_second": 1e6 / ms, "percent_of_matrix_rate": 50 / ms, "relative_error": error}
    return (
        {"shape": shape, "set": "prefill-models", "contender": contender, "milliseconds": ms, "flop": 1} | rates | more
    )


def run_of(rows: Sequence[dict[str, Any]], operation: str = "prefill") -> dict[str, Any]:
    about = {"gpu": "G", "cuda": "13", "command": "c", "date": "d", "commit": "h", "versions": {}}
    rates = {"0": {"torch mm fp16": 700000.0, "torch mm bf16": 690000.0}}
    eager = {"eager_call_microseconds": 5.0, "eager_peers_microseconds": {"torch add_": 4.0}}
    limits = {"matrix_rate_gigaflop_per_second": rates} | eager
    return about | limits | {"operation": operation, "rows": list(rows)}


PROMPT = [
    row("pyquantattn fresh fp16", 2.0),
    row("pyquantattn fresh bf16", 2.2),
    row("pyquantattn int8", 2.2),
    row("pyquantattn fp8_e4m3", 2.4),
    row("pyquantattn fp16", 2.1),
    row("torch flash fp16", 2.5),
    row("torch cuDNN fp16", 1.6),
    row("FlashInfer fa2 fp16", 2.1),
    row("FlashInfer fa2 e4m3 paged", 2.3),
]


def render(tmp_path: Path, view: str, run: dict[str, Any]) -> str:
    (tmp_path / "r.json").write_text(json.dumps({"runs": [run]}))
    document = tmp_path / "d.md"
    document.write_text(f"<!-- benchmark r.json {view} -->\nold\n<!-- end -->\n")
    assert report.render_document(document, tmp_path) == 1
    return document.read_text()


@pytest.mark.parametrize(
    ("view", "line"),
    [
        ("prefill@prefill-models", "| s | 2.200 (0.88x) | 2.000 (0.80x) | 2.500 | 1.600 | 2.100 |"),
        ("prefill-caches", "| s | 2.000 | 2.200 (1.10x) | 2.400 (1.20x) | 2.100 (1.05x) | 2.300 |"),
        ("fresh-rates", "| s | 500 (25 %) | 455 (23 %) | 400 (20 %) | 625 (31 %) | 476 (24 %) |"),
        ("prefill-targets", "| s | 2.000 | 0.80 | 0.95 | 1.25 | - | 1.10 | 1.20 | - | 2 of 4 |"),
        ("batch-losses", "- s: fresh fp16 2.000 ms, torch cuDNN fp16 1.600 ms"),
        ("batch-losses", "- s: fp8_e4m3 2.400 ms, FlashInfer fa2 e4m3 paged 2.300 ms"),
        ("runs", "torch mm fp16 700, torch mm bf16 690. Eager call: 5.0 us of host time, torch add_ 4.0."),
    ],
)
def test_prompts_of_a_gpu_are_rendered(tmp_path: Path, view: str, line: str) -> None:
    assert line in render(tmp_path, view, run_of(PROMPT))


def test_hybrid_batches_of_a_gpu_are_rendered(tmp_path: Path) -> None:
    rows = [row("pyquantattn fp16", 3.0), row("pyquantattn fp16 separate", 2.0), row("FlashInfer fa2 fp16 paged", 2.5)]
    run = run_of(rows, "hybrid")
    assert "| s | 3.000 (1.50x) | 2.000 | 2.500 |" in render(tmp_path, "hybrid", run)
    losses = render(tmp_path, "batch-losses", run)
    assert "- s: fp16 3.000 ms, fp16 separate 2.000 ms" in losses and "fa2 fp16 paged 2.500 ms" in losses


def test_sweeps_of_a_gpu_become_csv_and_charts(tmp_path: Path) -> None:
    rows = [
        row("pyquantattn int8", 1.0, shape=f"{one.name} {number}", set=one.name, sizes=vars(shape))
        for one in sweeps.cuda_sweeps(is_quick=True)
        for number, shape in enumerate(one.shapes)
    ]
    content = {"runs": [run_of(rows, "sweeps")]}
    sweeps.write_csv(content, tmp_path / "s.csv")
    sweeps.plot(content, tmp_path / "s.png")
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows) and lines[1].startswith("prefill-length,length,256,,pyquantattn int8,1.0,")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_says_so() -> None:
    command = [sys.executable, BENCHMARK, "--device", "cuda", "--operation", "prefill"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "--device cuda: torch sees no CUDA device" in result.stdout


@pytest.mark.skipif("cuda" not in pyquantattn.available_backends(), reason="no usable CUDA backend")
@pytest.mark.parametrize("operation", ["prefill", "hybrid"])
def test_quick_run_on_a_gpu_is_right(tmp_path: Path, operation: str) -> None:
    path = tmp_path / "quick.json"
    command = [sys.executable, BENCHMARK, "--device", "cuda", "--operation", operation, "--quick", "--peers", ""]
    result = subprocess.run([*command, "--save", str(path)], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    [run] = json.loads(path.read_text())["runs"]
    assert len(run["rows"]) == 12 and max(run["matrix_rate_gigaflop_per_second"]["0"].values()) > 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
