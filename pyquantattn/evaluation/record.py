"""What a reader needs to repeat a run, and the raw values."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import platform
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import pyquantattn
from pyquantattn import _core
from pyquantattn.evaluation.parts import input_statistics, table_of, tokens_of
from pyquantattn.evaluation.plan import Settings
from pyquantattn.evaluation.sequence import PAGE_SIZE
from pyquantattn.evaluation.spec import CacheSpec
from pyquantattn.evaluation.store import Arrays
from pyquantattn.evaluation.tensor_level import ATTENTION_METRICS, CODEC_METRICS


def software() -> dict[str, object]:
    """Versions and the build: everything of the machine that may change a bit of a result."""
    return {
        "pyquantattn": pyquantattn.__version__,
        "extension_sha256": _hash([Path(_core.__file__)]),
        "evaluation_sha256": _hash(sorted(Path(__file__).parent.glob("*.py"))),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        "kernel_threads": pyquantattn.get_num_threads(),
    }


def _hash(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def to_text(record: object) -> str:
    """Strict JSON: what is not a finite number, such as the standard error of one value, is null.

    >>> to_text({"error": float("nan")})
    '{\\n "error": null\\n}'
    """
    return json.dumps(_finite(record), indent=1, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment(settings: Settings, tensors: Arrays, device: str) -> dict[str, object]:
    """Software, machine, kernels and command of this run."""
    return {
        **software(),
        "machine": platform.machine(),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": pyquantattn.available_backends(),
        "kernels": kernels(settings, tensors, device),
        "command": sys.argv,
    }


@dataclass(frozen=True)
class Cost:
    """What the run itself took, from its first part to its last figure."""

    seconds: float
    cpu_seconds: float  # of all threads; the time is no longer than this where nothing else runs
    peak_bytes: int
    peak_of: str
    num_reused_parts: int  # what an interrupted run had done is missing in the times

    @classmethod
    def since(cls, start: float, cpu_start: float, num_reused_parts: int, device: str) -> Cost:
        """Of this process, from the given readings of time.perf_counter and time.process_time."""
        if torch.device(device).type == "cuda":
            peak, peak_of = torch.cuda.max_memory_allocated(device), "GPU memory"
        else:
            peak, peak_of = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "resident memory"
        return cls(time.perf_counter() - start, time.process_time() - cpu_start, peak, peak_of, num_reused_parts)

    def __str__(self) -> str:
        reused = f", {self.num_reused_parts} parts of an earlier run" if self.num_reused_parts else ""
        peak = f"peak {self.peak_bytes / 2**20:,.0f} MiB of {self.peak_of}"
        return f"{self.seconds:,.0f} s, {self.cpu_seconds:,.0f} s of CPU time, {peak}{reused}"


def kernels(settings: Settings, tensors: Arrays, device: str) -> dict[str, dict[str, object] | None]:
    """What decode_attention runs for each format and K and V of this shape: found by running it."""
    num_kv_heads, head_dim = tensors["input|0|k|channel_mean"].shape
    found: dict[str, dict[str, object] | None] = {}
    for name in settings.formats:
        kv_format = CacheSpec.parse(name).default.kv_format
        cache = pyquantattn.KVCache.allocate(
            1, PAGE_SIZE, num_kv_heads, head_dim, kv_format=kv_format, device=torch.device(device)
        )
        q = torch.zeros(1, num_kv_heads, head_dim, device=device)
        pyquantattn.decode_attention(q, cache, seq_lens=torch.zeros(1, dtype=torch.int32, device=device))
        kernel = pyquantattn.last_kernel()
        found[name] = kernel._asdict() if kernel else None
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_tokens(path: Path, decoded: list[Arrays], settings: Settings, text_names: list[str]) -> None:
    """One row for each text, contestant and position: KLD, -ln p of the next token, whether the first choice stays."""
    names = [contestant.name for contestant in (*settings.controls(), *settings.under_test(), *settings.ablations())]

    def rows() -> Iterator[list[object]]:
        for text, arrays in zip(text_names, decoded, strict=True):
            for name in names:
                tokens = tokens_of(arrays, name)
                columns = zip(tokens.kl, tokens.nll, tokens.reference_nll, tokens.same_top, strict=True)
                for position, (kl, nll, reference_nll, same) in enumerate(columns):
                    yield [text, name, position, f"{kl:.9g}", f"{nll:.9g}", f"{reference_nll:.9g}", int(same)]

    _write(path, ["text", "contestant", "position", "kl", "nll", "reference_nll", "same_top"], rows())


def write_attention(path: Path, tensors: list[Arrays], settings: Settings) -> None:
    """One row for each text, contestant, layer, query and head: every attention metric."""
    names = [contestant.name for contestant in (*settings.controls(), *settings.under_test(), *settings.ablations())]
    keys = ("layer", "context", "position", "head")

    def rows() -> Iterator[list[object]]:
        for text, arrays in enumerate(tensors):
            for name in names:
                table = table_of(arrays, "attention", name)
                for i in range(len(table["layer"])):
                    values = [f"{table[metric][i]:.6g}" for metric in ATTENTION_METRICS]
                    yield [text, name, *(int(table[key][i]) for key in keys), *values]

    _write(path, ["text", "contestant", *keys, *ATTENTION_METRICS], rows())


def write_codec(path: Path, tensors: list[Arrays], settings: Settings) -> None:
    """One row for each text, contestant, layer, K or V, and KV head: every codec metric."""
    names = [contestant.name for contestant in (*settings.controls(), *settings.under_test())]

    def rows() -> Iterator[list[object]]:
        for text, arrays in enumerate(tensors):
            for name in names:
                table = table_of(arrays, "codec", name)
                for i in range(len(table["layer"])):
                    place = (int(table["layer"][i]), "KV"[int(table["is_v"][i])], int(table["head"][i]))
                    yield [text, name, *place, *(f"{table[metric][i]:.6g}" for metric in CODEC_METRICS)]

    _write(path, ["text", "contestant", "layer", "kv", "head", *CODEC_METRICS], rows())


def write_channels(path: Path, tensors: list[Arrays], num_layers: int) -> None:
    """One row for each text, layer, K or V, KV head and channel: mean and standard deviation over the tokens."""

    def rows() -> Iterator[list[object]]:
        for (text, arrays), layer, kv in itertools.product(enumerate(tensors), range(num_layers), "KV"):
            found = input_statistics(arrays, layer, kv.lower())
            for head, channel in np.ndindex(found.channel_mean.shape):
                values = (found.channel_mean[head, channel], found.channel_std[head, channel])
                yield [text, layer, kv, head, channel, *(f"{value:.6g}" for value in values)]

    _write(path, ["text", "layer", "kv", "head", "channel", "mean", "std"], rows())


def _write(path: Path, header: list[str], rows: Iterable[list[object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
