"""This library as a contender of the CPU decode benchmark."""

from __future__ import annotations

import torch
from torch import Tensor

import pyquantattn as qa

from .cpu_contenders import StepData, UnavailableError
from .cpu_shapes import DecodeShape
from .cpu_timing import num_copies
from .filled_caches import FilledCaches


class PyQuantAttn:
    """decode_attention over a cache of one format."""

    def __init__(self, data: StepData, kv_format: str) -> None:
        shape = data.shape
        if not qa.supports(kv_format=kv_format, head_dim=shape.head_dim, device="cpu"):
            raise UnavailableError(f"pyquantattn {kv_format}: this build has no kernel for head_dim {shape.head_dim}")
        self.name, self.data = f"pyquantattn {kv_format}", data
        lengths = data.seq_lens.tolist()
        keys, values = ([x[row, :n] for row, n in enumerate(lengths)] for x in (data.k, data.v))
        self.filled = FilledCaches(keys, values, shape.page_size, kv_format, num_copies)
        self.cache_bytes = self.filled.nbytes
        self.out = torch.empty_like(data.q)

    def call(self, copy: int) -> Tensor:
        lengths = {"seq_lens": self.data.seq_lens, "page_table": self.filled.page_table}
        return qa.decode_attention(self.data.q, self.filled.cache(copy), **lengths, out=self.out)

    def output(self) -> Tensor:
        return self.call(0)

    def dequantized(self, row: int) -> tuple[Tensor, Tensor]:
        return self.filled.dequantized(row)


def call_overhead_cache() -> PyQuantAttn:
    """A step over one token of one head, whose kernel takes next to no time."""
    return PyQuantAttn(StepData.random(DecodeShape(1, 1, 1, 64, 1)), "int8")
