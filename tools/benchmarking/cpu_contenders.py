"""What a contender of the CPU benchmark is, the data that all of them get, and the check of their outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from reference import attention_float64
from torch import Tensor

from .cpu_shapes import DecodeShape


@dataclass(frozen=True)
class StepData:
    """One decode step. B batch_size, L the longest kv_len, float32 throughout."""

    shape: DecodeShape
    q: Tensor  # [B, Hq, D]
    k: Tensor  # [B, L, Hkv, D]
    v: Tensor
    seq_lens: Tensor  # [B] int32

    @classmethod
    def random(cls, shape: DecodeShape) -> StepData:
        generator = torch.Generator().manual_seed(11)
        seq_lens = shape.seq_lens()
        kv_shape = (shape.batch_size, int(seq_lens.max()), shape.num_kv_heads, shape.head_dim)
        q = torch.randn(shape.batch_size, shape.num_q_heads, shape.head_dim, generator=generator)
        k, v = (torch.randn(kv_shape, generator=generator) for _ in range(2))
        return cls(shape, q, k, v, seq_lens)


class Contender(Protocol):
    """One library with one cache format, its caches allocated and filled for a step."""

    name: str
    cache_bytes: int  # of codes and scales that one step must read

    def call(self, copy: int) -> object:
        """Runs the step over rotated copy `copy` (any number; taken modulo the number of copies)."""

    def output(self) -> Tensor:
        """[B, Hq, D] of a step over copy 0."""

    def dequantized(self, row: int) -> tuple[Tensor, Tensor]:
        """K and V [kv_len, Hkv, D] of one sequence as its codes and scales define them, float64."""


class UnavailableError(Exception):
    """This contender cannot run here or on this shape; the message says why."""


def relative_error(data: StepData, contender: Contender) -> float:
    """Relative L2 distance of the output to float64 attention over the contender's own dequantised cache."""
    out = contender.output().double()
    error = norm = 0.0
    for row in sorted({0, data.shape.batch_size - 1}):
        expected = attention_float64(data.q[row][None], *contender.dequantized(row))[0][0]
        error += float((out[row] - expected).square().sum())
        norm += float(expected.square().sum())
    return math.sqrt(error / norm)
