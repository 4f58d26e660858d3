"""A CUDA benchmark: every shape of a run, with the limits that its rows are judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import pyquantattn as qa

from . import cuda_batch_peers, cuda_batches, cuda_decode, cuda_peers, cuda_timing
from .batch_shapes import HybridShape, PrefillShape
from .cuda_contenders import Options
from .cuda_shapes import DecodeShape
from .results import Row

Shape = DecodeShape | PrefillShape | HybridShape
PEERS = {"decode": cuda_peers.PEERS, "sweeps": ("torch", "flashinfer", "fa3", "pod")} | cuda_batch_peers.PEERS
FORMATS = {
    "decode": "int8,fp8_e4m3,fp8_e5m2,fp16,bf16",
    "prefill": "fresh fp16,fresh bf16,int8,int8 static,fp8_e4m3,fp8_e4m3 static,fp8_e5m2,fp16",
    "hybrid": "int8,fp8_e4m3,fp16",
}
SWEEP_FORMATS = {"decode": "int8,fp8_e4m3,fp16", "prefill": "fresh fp16,int8,fp8_e4m3,fp16", "hybrid": "int8,fp16"}


def unavailable() -> str | None:
    """Why nothing can be measured here; None where it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if "cuda" not in qa.available_backends():
        return "this build of pyquantattn has no usable CUDA backend; python -m pyquantattn.doctor says why"
    return None


def describe_device() -> dict[str, str]:
    """What a reader needs to know of the device."""
    return {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}


@dataclass(frozen=True)
class Job:
    """A shape to measure and what takes part."""

    shape: Shape
    options: Options
    set: str  # that the rows belong to


class Limits:
    """The device's own rates, measured once for the kinds of shapes that a run has."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        are_decode = {isinstance(job.shape, DecodeShape) for job in jobs}
        self.floor = cuda_timing.read_floor() if True in are_decode else (0.0, 0.0)
        self.matrix_rates = cuda_timing.matrix_rate() if False in are_decode else {}
        eager = cuda_decode.eager_microseconds()
        self.found: dict[str, Any] = {
            "eager_call_microseconds": eager.pop("decode_attention"),
            "eager_peers_microseconds": eager,
        }
        if True in are_decode:
            fixed, rate = self.floor
            self.found["read_bandwidth_gigabytes_per_second"] = {"0": {"read kernel": round(rate / 1e3, 1)}}
            self.found["fixed_microseconds"] = round(fixed, 2)
        if False in are_decode:
            rates = {program: round(rate, 1) for program, rate in self.matrix_rates.items()}
            self.found["matrix_rate_gigaflop_per_second"] = {"0": rates}

    def measure(self, job: Job) -> list[Row]:
        if isinstance(job.shape, DecodeShape):
            return cuda_decode.measure_shape(job.shape, job.options, self.floor)
        return cuda_batches.measure_shape(job.shape, job.options, max(self.matrix_rates.values()))


def run(jobs: Sequence[Job], report: Callable[[list[Row], Row], None], *, with_append: bool) -> dict[str, Any]:
    """Measures every shape; `report` gets the rows of each and the limits of the run, which are also returned."""
    limits = Limits(jobs)
    if with_append:
        limits.found["append"] = cuda_decode.append_rows(limits.floor)
    for job in jobs:
        report([row | {"set": job.set} for row in limits.measure(job)], limits.found)
    return limits.found
