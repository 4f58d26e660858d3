#!/usr/bin/env python3
"""Attention over quantised caches of a real model's keys and values: every KV format's memory, error and time.

Loads tools/models/pybyte-8m, reads held-out text of this interpreter's standard library through it, quantises the real
K and V into paged caches in every format, decodes over them, lets the model write text from prompts by prefill, append
and decode, and writes demo-report/. Exits with 1 if a sanity bound is broken.

  python tools/demo.py [--device cuda] [--formats int8,fp8_e4m3] [--out demo-report]
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from evaluation import attention_error, generation, report
from evaluation.cached_model import Capture, PagedCaches, filled_caches, has_prefill
from evaluation.checks import check_controls, check_format
from models.corpus import held_out_texts
from models.llama import Llama
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import pyquantattn as qa
from pyquantattn.formats import KV_PAIRS

ROOT = Path(__file__).resolve().parents[1]
MODEL = Path(__file__).parent / "models" / "pybyte-8m"
NUM_SEQUENCES, NUM_TOKENS = 4, 4096
LENGTHS = (512, 1024, 2048, NUM_TOKENS)  # context lengths whose last queries are decoded
NUM_FORCED, NUM_GENERATED = 64, 64  # tokens decoded through the cache with the text given, and written freely
NUM_PROMPT = 1024  # tokens of each text that the model reads before it writes
SAMPLE_FORMAT = "int8"

console = Console()


class Demo:
    """The model, its text, and what full precision says; each format is measured against that."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.model = Llama.load(MODEL, device)
        self.names, texts = zip(*held_out_texts(NUM_SEQUENCES, NUM_TOKENS), strict=True)
        self.tokens = torch.tensor([list(text) for text in texts], device=device)
        self.capture = Capture()
        self.logits = self.model(self.tokens, attend=self.capture)
        self.original = attention_error.original_attention(self.capture, LENGTHS)
        # A small model's single tokens gain nothing from torch's threads, which spin while idle, on cores that
        # decode_attention's threads need.
        qa.set_num_threads(torch.get_num_threads())
        torch.set_num_threads(1)
        self.errors: dict[str, attention_error.AttentionErrors] = {}
        self.generated: dict[str, torch.Tensor] = {}

    def caches(self, kv_format: str, length: int = NUM_TOKENS, max_len: int = NUM_TOKENS) -> PagedCaches:
        return filled_caches(self.capture, self.model.config, kv_format, length, max_len)

    def measure(self, kv_format: str) -> dict[str, Any]:
        """Everything about one format but its time, which is measured for all formats in turn."""
        caches = self.caches(kv_format)
        errors = self.errors[kv_format] = attention_error.measure(self.capture, caches, LENGTHS, self.original)
        first = NUM_TOKENS - NUM_FORCED
        predictions = generation.teacher_forced(
            self.model, self.tokens[:, first:], self.caches(kv_format, first), self.logits[:, first:]
        )
        empty = PagedCaches(self.model.config, kv_format, NUM_SEQUENCES, NUM_PROMPT + NUM_GENERATED, self.device)
        written = generation.generate(self.model, self.tokens[:, :NUM_PROMPT], empty, NUM_GENERATED)
        self.generated[kv_format] = written.tokens
        return {
            "kv_format": kv_format,
            "bits_per_element": caches.layers[0].bits_per_element,
            "cache_bytes": caches.nbytes,
            "cache_megabytes": caches.nbytes / 1e6,
            "saving_percent": 100 * (1 - caches.nbytes / self.fp16_bytes),
            **errors.summary(),
            "codec_error_by_length": dict(zip(LENGTHS, errors.codec.mean(dim=(0, 2, 3, 4)).tolist(), strict=True)),
            "codec_error_by_layer": errors.codec.mean(dim=(1, 2, 3, 4)).tolist(),
            "predictions": asdict(predictions),
            "kl_milli": 1e3 * predictions.kl_mean,
            "kl_se_milli": 1e3 * predictions.kl_standard_error,
            "same_top_1_percent": 100 * predictions.same_top_1,
            "prompt_tokens_per_second": written.prompt_tokens_per_second,
            "tokens_per_second": written.tokens_per_second,
            "agreement_percent": 100 * written.agreement,
            "generated_text": bytes(written.tokens[0].tolist()).decode("utf-8", "replace"),
        }

    @property
    def fp16_bytes(self) -> int:
        """Bytes of K and V of all layers at two bytes per element, from the model's sizes alone."""
        return sum(2 * (k.numel() + v.numel()) for _, k, v in self.capture.layers)

    def milliseconds(self, kv_formats: list[str]) -> list[float]:
        """Median time of one decoded token per sequence through every layer's attention, formats in turn."""
        queries = [q[:, -1].contiguous() for q, _, _ in self.capture.layers]
        runs = []
        for kv_format in kv_formats:
            caches = self.caches(kv_format)
            arguments = {"seq_lens": caches.seq_lens, "page_table": caches.page_table}
            pairs = list(zip(queries, caches.layers, strict=True))
            runs.append(lambda pairs=pairs, arguments=arguments: [qa.decode_attention(*p, **arguments) for p in pairs])
        if self.device == "cuda":
            from benchmarking.cuda_timing import microseconds_per_call

            return [microseconds_per_call([run] * 8) / 1e3 for run in runs]
        from benchmarking.cpu_timing import interleaved_milliseconds

        turns = interleaved_milliseconds([lambda _, run=run: run() for run in runs], rounds=5)
        return [sorted(medians)[len(medians) // 2] for medians in turns]

    def about(self) -> dict[str, Any]:
        kernel, reads_prompts = qa.last_kernel(), has_prefill(self.capture.layers[0][0])
        prompt = bytes(self.tokens[0, :NUM_PROMPT].tolist()).decode("utf-8", "replace")
        return {
            "model": MODEL.name,
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "CPU",
            "kernel": "none" if kernel is None else f"{kernel.backend}, {kernel.variant}",
            "threads": qa.get_num_threads(),
            "versions": {"pyquantattn": qa.__version__, "torch": torch.__version__, "python": sys.version.split()[0]},
            "texts": list(self.names),
            "sequences": NUM_SEQUENCES,
            "tokens": NUM_TOKENS,
            "prompt_tokens": NUM_PROMPT,
            "prompt_attention": "`prefill_attention`" if reads_prompts else "torch's attention",
            "generated_tokens": NUM_GENERATED,
            "sample_formats": ["fp16", SAMPLE_FORMAT],
            "prompt_end": prompt.splitlines()[-1],
        }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if "cuda" in qa.available_backends() else "cpu", help="cpu or cuda")
    parser.add_argument(
        "--formats", default=",".join(KV_PAIRS), help="comma-separated; fp16 and int8 are always measured"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "demo-report", help="folder of the report")
    return parser.parse_args()


def chosen_formats(text: str) -> list[str]:
    names = list(dict.fromkeys(["fp16", SAMPLE_FORMAT, *text.split(",")]))
    if unknown := [name for name in names if name not in KV_PAIRS]:
        raise SystemExit(f"demo: --formats must name formats of {', '.join(KV_PAIRS)}, got {', '.join(unknown)}")
    return [name for name in KV_PAIRS if name in names]


def measure_all(device: str, kv_formats: list[str]) -> tuple[Demo, list[dict[str, Any]], list[dict[str, Any]]]:
    """The demo, a record per format, and the checks."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress, torch.inference_mode():
        task = progress.add_task("reading held-out text through the model", total=len(kv_formats) + 3)
        demo = Demo(device)
        records = []
        for kv_format in kv_formats:
            progress.update(task, advance=1, description=f"decoding and writing over {kv_format}")
            records.append(demo.measure(kv_format))
        progress.update(task, advance=1, description="timing")
        for record, milliseconds in zip(records, demo.milliseconds(kv_formats), strict=True):
            record["milliseconds"] = milliseconds
            same = generation.common_prefix(demo.generated[record["kv_format"]], demo.generated["fp16"])
            record["common_prefix_with_fp16"] = same
        progress.update(task, advance=1, description="controls")
        checks = [check for record in records for check in check_format(record)]
        checks += check_controls(
            demo.capture, demo.caches(SAMPLE_FORMAT), LENGTHS, demo.original, demo.errors[SAMPLE_FORMAT]
        )
        progress.update(task, advance=1, description="done")
    return demo, records, checks


def show(records: list[dict[str, Any]], checks: list[dict[str, Any]]) -> None:
    for columns in (report.NARROW_COLUMNS, report.GENERATION_COLUMNS):
        table = Table(*(name for name, _ in columns), box=box.SIMPLE_HEAD, padding=0)
        for record in records:
            table.add_row(*report.cells(record, columns))
        console.print(table)
    for check in checks:
        if not check["passed"]:
            console.print(f"BROKEN {check['rule']}, got {check['got']}", style="bold red", markup=False)
    console.print(f"{sum(check['passed'] for check in checks)} of {len(checks)} checks hold")


def main() -> int:
    arguments = parse_arguments()
    start = time.monotonic()
    demo, records, checks = measure_all(arguments.device, chosen_formats(arguments.formats))
    show(records, checks)
    report.write(arguments.out, demo.about(), records, checks)
    report.plot(arguments.out, records, demo.errors)
    console.print(f"wrote report.md, report.json and report.png in {arguments.out} ({time.monotonic() - start:.0f} s)")
    return 0 if all(check["passed"] for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
