"""Decode shapes measured on a CPU, in named sets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .lengths import batch_lengths


@dataclass(frozen=True)
class DecodeShape:
    """One decode step of one query token per sequence."""

    batch_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    kv_len: int
    page_size: int | None = None  # None: contiguous, one page per sequence
    cv: float = 0.0  # coefficient of variation of log-normal lengths with the uniform batch's total; 0: uniform

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def label(self) -> str:
        parts = [f"{self.batch_size} x {self.kv_len}", f"{self.num_q_heads}/{self.num_kv_heads}", f"D={self.head_dim}"]
        if self.page_size is not None:
            parts.append(f"page {self.page_size}")
        if self.cv:
            parts.append(f"ragged CV {self.cv:g}")
        return ", ".join(parts)

    def seq_lens(self) -> torch.Tensor:
        """[B] int32."""
        return torch.tensor(batch_lengths(self.batch_size, self.kv_len, self.cv), dtype=torch.int32)


# The shapes of docs/performance.md's comparison: MHA, GQA 4, long context, a batch, GQA 8, MQA.
MODELS = [
    DecodeShape(1, 32, 32, 128, 4096),
    DecodeShape(1, 32, 8, 128, 4096),
    DecodeShape(1, 32, 8, 128, 32768),
    DecodeShape(8, 32, 8, 128, 2048),
    DecodeShape(1, 64, 8, 128, 8192),
    DecodeShape(1, 32, 1, 128, 8192),
]
_BASE = DecodeShape(1, 32, 8, 128, 4096)

SETS: dict[str, list[DecodeShape]] = {
    "models": MODELS,
    "lengths": [replace(_BASE, kv_len=length) for length in (256, 512, 1024, 2048, 8192)],
    "head_dims": [replace(_BASE, head_dim=head_dim) for head_dim in (64, 80, 96, 192, 256)],
    "groups": [replace(_BASE, num_q_heads=8 * group, kv_len=8192) for group in (1, 2, 8, 16)],
    "layouts": [
        replace(_BASE, page_size=16),
        replace(_BASE, batch_size=8, kv_len=2048, page_size=16),
        replace(_BASE, batch_size=8, kv_len=2048, page_size=16, cv=1.0),
        replace(_BASE, num_kv_heads=32, page_size=16),
    ],
}
QUICK = [DecodeShape(1, 32, 32, 128, 1024), DecodeShape(1, 32, 8, 128, 4096)]


def parse_shapes(text: str) -> list[DecodeShape]:
    """Shapes from a comma-separated list of set names, or of batch:q_heads:kv_heads:head_dim:kv_len[:page_size]."""
    shapes = []
    for item in text.split(","):
        if item in SETS:
            shapes += SETS[item]
            continue
        sizes = item.split(":")
        if not (5 <= len(sizes) <= 6 and all(size.isdigit() and int(size) > 0 for size in sizes)):
            raise ValueError(
                f"--shapes: an item must be one of {', '.join(SETS)} or "
                f"batch:q_heads:kv_heads:head_dim:kv_len[:page_size], got {item}"
            )
        shapes.append(DecodeShape(*map(int, sizes)))
    return list(dict.fromkeys(shapes))


def set_of(shape: DecodeShape) -> str:
    """The set that a shape belongs to, the first of several; empty for a shape of the caller's own."""
    return next((name for name, shapes in SETS.items() if shape in shapes), "")
