"""Lengths of the sequences of a ragged batch."""

from __future__ import annotations

import math

import torch


def batch_lengths(batch_size: int, mean: int, cv: float) -> list[int]:
    """One length for each sequence: all `mean`, or log-normal with coefficient of variation `cv`.

    Ragged batches are rescaled to the total of the uniform one, so that both have the same work to read.
    """
    if not cv:
        return [mean] * batch_size
    generator = torch.Generator().manual_seed(7)
    sigma = math.sqrt(math.log1p(cv**2))
    weights = torch.exp(sigma * torch.randn(batch_size, generator=generator, dtype=torch.float64))
    lengths = (weights / weights.sum() * mean * batch_size).round().clamp(min=1)
    return lengths.to(torch.int64).tolist()
