"""What is measured on one shape of a CPU benchmark: who takes part, and what is known of each besides its time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import batch_contenders, batch_shapes, cpu_contenders
from .batch_contenders import FRESH, BatchData, Place
from .batch_shapes import HybridShape, PrefillShape
from .cpu_contenders import StepData
from .cpu_ggml import GgmlFlashAttention, GgmlPrefill
from .cpu_onnxruntime import OnnxRuntimeGqa
from .cpu_onnxruntime_prefill import OnnxRuntimePrefill
from .cpu_ours import PyQuantAttn
from .cpu_shapes import DecodeShape, set_of
from .cpu_timing import num_copies
from .cpu_torch import TorchPrefill, TorchSdpa
from .results import Row

Shape = DecodeShape | PrefillShape | HybridShape

PEERS = {
    "decode": ("torch", "onnxruntime", "ggml"),
    "prefill": ("torch", "onnxruntime", "ggml"),
    "hybrid": (),
}
GGML_TYPES = ("f16", "q8_0")
# Prompts are bound by arithmetic and their K and V were just computed: only caches are rotated.
PLACE = Place("cpu", torch.float32, num_copies, num_fresh_copies=lambda num_bytes: 1)
FORMATS = {
    "decode": "int8,fp8_e4m3,fp8_e5m2,fp16,bf16",
    "prefill": f"{FRESH}fp32,{FRESH}bf16,{FRESH}fp16,int8,fp8_e4m3,fp8_e5m2,fp16,bf16",
    "hybrid": "int8,fp8_e4m3,fp16",
}


@dataclass(frozen=True)
class Options:
    kv_formats: list[str]  # to prefill also `fresh fp32` and the like: K and V of that type, no cache
    peers: list[str]
    rounds: int
    ggml: Path | None = None  # folder of a built libggml


@dataclass(frozen=True)
class Workload:
    about: Row  # of the shape
    contenders: dict[str, Callable[[], Any]]  # by name, not yet built
    facts: Callable[[Any], Row]  # of a contender


def workload_of(shape: Shape, options: Options, num_threads: int) -> Workload:
    make = _decode if isinstance(shape, DecodeShape) else _batch
    return make(shape, options, num_threads)


def _decode(shape: DecodeShape, options: Options, num_threads: int) -> Workload:
    data = StepData.random(shape)
    found: dict[str, Callable[[], Any]] = {}
    for kv_format in options.kv_formats:
        found[f"pyquantattn {kv_format}"] = partial(PyQuantAttn, data, kv_format)
    if not shape.cv:  # the peers take batches of equal lengths, or pad to the longest
        found |= _decode_peers(data, options, num_threads)

    def facts(contender: cpu_contenders.Contender) -> Row:
        error = cpu_contenders.relative_error(data, contender)
        return {"cache_bytes": contender.cache_bytes, "relative_error": float(f"{error:.2e}")}

    return Workload({"set": set_of(shape)}, found, facts)


def _decode_peers(data: StepData, options: Options, num_threads: int) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    if data.shape.page_size is not None:  # none of the peers has paged caches: they get contiguous ones
        data = replace(data, shape=replace(data.shape, page_size=None))
    if "torch" in options.peers:
        for dtype in ("fp32", "bf16"):
            found[f"torch {dtype}"] = partial(TorchSdpa, data, dtype, is_grouped=False)
            if data.shape.group_size > 1:
                found[f"torch {dtype} grouped"] = partial(TorchSdpa, data, dtype, is_grouped=True)
    if "onnxruntime" in options.peers:
        for name in ("fp32", "int8 per tensor", "int8 per channel"):
            found[f"onnxruntime {name}"] = partial(OnnxRuntimeGqa, data, name, num_threads)
    if "ggml" in options.peers and options.ggml is not None:
        for name in GGML_TYPES:
            found[f"ggml {name}"] = partial(GgmlFlashAttention, data, name, num_threads, options.ggml)
    return found


def _batch(shape: PrefillShape | HybridShape, options: Options, num_threads: int) -> Workload:
    data = BatchData.random(shape, PLACE)
    found = batch_contenders.ours(data, shape, options.kv_formats)
    if isinstance(shape, PrefillShape) and not shape.cv:  # the peers take batches of equal lengths
        found |= _prefill_peers(data, options, num_threads)
    return Workload(
        {"set": batch_shapes.set_of(shape), "flop": shape.flop}, found, partial(batch_contenders.facts, data)
    )


def _prefill_peers(data: BatchData, options: Options, num_threads: int) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    if "torch" in options.peers:
        found |= {f"torch {dtype}": partial(TorchPrefill, data, dtype) for dtype in batch_contenders.DTYPES}
    if not data.is_causal:  # the others know no prompt that is not
        return found
    if "onnxruntime" in options.peers:
        found["onnxruntime fp32"] = partial(OnnxRuntimePrefill, data, num_threads)
    if "ggml" in options.peers and options.ggml is not None:
        for name in GGML_TYPES:
            found[f"ggml {name}"] = partial(GgmlPrefill, data, name, num_threads, options.ggml)
    return found
