"""The command ``pyquantattn-evaluate``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pyquantattn import UnsupportedError
from pyquantattn.evaluation import markdown
from pyquantattn.evaluation.inputs import BuiltIn, run
from pyquantattn.evaluation.plan import EIGHT_BITS, SIXTEEN_BITS, Settings
from pyquantattn.evaluation.profiles import PROFILES
from pyquantattn.evaluation.record import (
    Cost,
    environment,
    to_text,
    write_attention,
    write_channels,
    write_codec,
    write_tokens,
)
from pyquantattn.evaluation.run import Progress, RawResults
from pyquantattn.evaluation.summary import Json, Summary

if TYPE_CHECKING:
    from rich.console import Console

EXTRAS = ("matplotlib", "rich", "safetensors")
DTYPES = ("auto", "float32", "float16", "bfloat16")
EXIT_CONTROL_FAILED, EXIT_INTERRUPTED = 2, 130


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="pyquantattn-evaluate", description="What KV cache formats cost on a model: accuracy against memory."
    )
    _add_inputs(parser)
    _add_amounts(parser)
    render = "rewrite the marked tables of a document from the records they name, and stop"
    parser.add_argument("--render", type=Path, metavar="DOCUMENT", help=render)
    found = parser.parse_args(arguments)
    if sum(given is not None for given in (found.model, found.tensors, found.profiles)) > 1:
        parser.error("give one of --model, --tensors, --profiles")
    if (found.model is None) != (found.text is None):
        parser.error("--model and --text go together")
    if not (found.tensors is None and found.profiles is None) and (found.needles or found.shift_keys is not None):
        parser.error("--needles and --shift-keys need a model")
    if found.shift_keys is not None and not math.isfinite(found.shift_keys):
        parser.error(f"--shift-keys must be finite, got {found.shift_keys}")
    return found


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="local Hugging Face model folder (needs transformers)")
    add("--text", type=Path, nargs="+", metavar="FILE", help="text to decode, for --model")
    add("--tensors", type=Path, metavar="FILE", help=".npz or .safetensors with q, k, v, instead of a model")
    add("--profiles", nargs="*", choices=PROFILES, help="synthetic tensors instead of a model; none named: all")
    shift = "add a constant of about X to three key channels of each head: the same model with a fragile cache"
    add("--shift-keys", type=float, metavar="X", help=shift)
    examples = "int8, fp16/int8, int8@head, int8@head:256, int8:centred, int8+0=fp16+-1=fp16"
    specs = f"{examples} (default: the reference and {', '.join(EIGHT_BITS)})"
    add("--formats", nargs="+", metavar="SPEC", help=specs)
    each = "also measure SPEC in one layer alone, the reference in the others, for each layer"
    add("--each-layer", metavar="SPEC", help=each)
    reference = "16-bit format to compare with (default: fp16, or bf16 for a bfloat16 model)"
    add("--reference", choices=SIXTEEN_BITS, help=reference)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", choices=DTYPES, help="weights of --model")
    out = "where the report is written; the same command goes on with an interrupted run"
    add("--out", type=Path, default=Path("evaluation-report"), metavar="DIR", help=out)


def _add_amounts(parser: argparse.ArgumentParser) -> None:
    defaults = Settings()

    def add_count(flag: str, default: int, help_text: str) -> None:
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{help_text} (default: {default})")

    contexts = "upper bounds of the context buckets; the last is the length of a text"
    parser.add_argument("--contexts", type=int, nargs="+", metavar="N", help=contexts)
    add_count("--texts", defaults.num_texts, "passages to decode")
    add_count("--attention-texts", defaults.num_attention_texts, "of these, also compared by layer and head")
    add_count("--uncached", defaults.num_uncached, "tokens of each text also run without a cache, as a control")
    add_count("--greedy-prompt", defaults.greedy_prompt, "tokens before a greedy continuation")
    add_count("--greedy-tokens", defaults.greedy_tokens, "length of a greedy continuation; 0: none")
    add_count("--needles", defaults.num_needles, "pass keys hidden at each of five depths of each context; 0: none")
    parser.add_argument("--no-ablations", action="store_true", help="leave out K only and V only")


def write_reports(folder: Path, record: Json, settings: Settings, raw: RawResults) -> None:
    """report.json, report.html, report.md, and the raw values as CSV."""
    from pyquantattn.evaluation.html_report import render
    from pyquantattn.evaluation.parts import tokens_of

    kls = {}
    if raw.decoded:
        kls = {
            name: [tokens_of(part, settings.contestant_name(name)).kl for part in raw.decoded]
            for name in settings.formats
        }
        write_tokens(folder / "tokens.csv", raw.decoded, settings, [text["name"] for text in record["inputs"]["texts"]])
    write_attention(folder / "attention.csv", raw.tensors, settings)
    write_codec(folder / "codec.csv", raw.tensors, settings)
    write_channels(folder / "channels.csv", raw.tensors, len(raw.layer_labels))
    (folder / "report.json").write_text(to_text(record) + "\n")
    (folder / "report.html").write_text(render(record, kls))
    (folder / "report.md").write_text(markdown.report(record))


def evaluate(arguments: argparse.Namespace, built_in: BuiltIn | None, console: Console, progress: Progress) -> Json:
    """Runs everything and writes the reports; returns the record."""
    start, cpu_start = time.perf_counter(), time.process_time()
    done = run(arguments, built_in, progress)
    summary = Summary(done.raw, done.settings)
    results = summary.to_json()
    cost = Cost.since(start, cpu_start, done.raw.num_reused, arguments.device)
    record: Json = {
        "inputs": done.inputs,
        "settings": done.settings.to_json(),
        "results": results,
        "measured_times": summary.measured_times(),
        "measured_cost": dataclasses.asdict(cost),
        "environment": environment(done.settings, done.raw.tensors[0], arguments.device),
    }
    write_reports(arguments.out, record, done.settings, done.raw)
    console.print(f"{cost}; report in {arguments.out}/report.html", highlight=False)
    return record


def main(arguments: Sequence[str] | None = None, built_in: BuiltIn | None = None) -> int:
    """Runs the command; 0 where every control passed, 2 where one failed, 1 for a bad argument."""
    parsed = parse_arguments(arguments)
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        print(f"pyquantattn-evaluate: needs {', '.join(missing)}: pip install 'pyquantattn[evaluation]'")
        return 1
    from rich.console import Console

    from pyquantattn.evaluation.terminal import TerminalProgress, print_record

    console = Console()
    try:
        if parsed.render is not None:
            console.print(f"{parsed.render}: {markdown.render_document(parsed.render)} tables", highlight=False)
            return 0
        record = evaluate(parsed, built_in, console, TerminalProgress(console))
    except (ValueError, OSError, UnsupportedError) as error:
        shown = f"evaluate: {error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        console.print(shown, style="red", highlight=False, markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on where it was", style="yellow")
        return EXIT_INTERRUPTED
    print_record(console, record)
    return 0 if record["results"]["controls_passed"] else EXIT_CONTROL_FAILED
