"""Prefill and hybrid batches to measure, in named sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

from .lengths import batch_lengths


def parse_sizes(item: str, names: str) -> list[int]:
    """The numbers of `4:32:8` for names such as `batch:q_heads:kv_heads`."""
    sizes = item.split(":")
    if len(sizes) != len(names.split(":")) or not all(size.isdigit() for size in sizes):
        raise ValueError(f"--shapes: an item must be the name of a set or {names}, got {item}")
    return [int(size) for size in sizes]


def visible_pairs(query_counts: Sequence[int], kv_lens: Sequence[int], is_causal: bool) -> int:
    """Scores that are not masked, of one head: the last query_counts[b] of kv_lens[b] tokens are queries."""
    hidden = sum(count * (count - 1) // 2 for count in query_counts) if is_causal else 0
    return sum(count * length for count, length in zip(query_counts, kv_lens, strict=True)) - hidden


@dataclass(frozen=True)
class PrefillShape:
    """Whole prompts. `cv`: coefficient of variation of log-normal lengths around `length`; 0: all have it."""

    batch_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    length: int
    is_causal: bool = True
    cv: float = 0.0

    @property
    def label(self) -> str:
        label = f"{self.batch_size} x {self.length}, {self.num_q_heads}/{self.num_kv_heads}, D={self.head_dim}"
        label += "" if self.is_causal else ", not causal"
        return label + (f", ragged CV {self.cv:g}" if self.cv else "")

    @property
    def query_counts(self) -> list[int]:
        return batch_lengths(self.batch_size, self.length, self.cv)

    @property
    def kv_lens(self) -> list[int]:
        return self.query_counts

    @property
    def flop(self) -> int:
        """Two for each product of q and K or of p and V; masked scores are not counted."""
        pairs = visible_pairs(self.query_counts, self.kv_lens, self.is_causal)
        return 4 * self.num_q_heads * self.head_dim * pairs


@dataclass(frozen=True)
class HybridShape:
    """A batch over a cache: some sequences read the last `chunk` tokens of a prompt, the others decode one."""

    batch_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    kv_len: int
    chunk: int
    prefill_percent: int
    is_causal: ClassVar[bool] = True

    @property
    def label(self) -> str:
        sizes = f"{self.batch_size} x {self.kv_len}, {self.num_q_heads}/{self.num_kv_heads}, D={self.head_dim}"
        return f"{sizes}, chunks of {self.chunk}, {self.prefill_percent} % prefill"

    @property
    def query_counts(self) -> list[int]:
        """Query tokens of each sequence; those that prefill are spread over the batch."""
        prefills = round(self.batch_size * self.prefill_percent / 100)
        marks = [index * prefills // self.batch_size for index in range(self.batch_size + 1)]
        return [self.chunk if later > earlier else 1 for earlier, later in pairwise(marks)]

    @property
    def kv_lens(self) -> list[int]:
        return [self.kv_len] * self.batch_size

    @property
    def flop(self) -> int:
        return 4 * self.num_q_heads * self.head_dim * visible_pairs(self.query_counts, self.kv_lens, self.is_causal)


# Long prompts of MHA, one very long one of GQA, many short ones, a small head_dim: what other libraries publish.
_GPU_MODELS = [
    PrefillShape(4, 32, 32, 128, 4096),
    PrefillShape(1, 32, 8, 128, 16384),
    PrefillShape(16, 32, 32, 128, 512),
    PrefillShape(8, 32, 8, 64, 4096),
]
PREFILL_SETS: dict[str, list[PrefillShape]] = {
    "prefill": [
        PrefillShape(1, 32, num_kv_heads, head_dim, length)
        for head_dim in (128, 64)
        for num_kv_heads in (32, 8)
        for length in (512, 2048, 4096)
    ],
    "prefill-batches": [
        PrefillShape(batch_size, 32, 8, 128, 4096 // batch_size) for batch_size in (2, 8, 32)
    ],
    "prefill-models": _GPU_MODELS,
    "prefill-ragged": [PrefillShape(16, 32, num_kv_heads, 128, 1024, cv=1.0) for num_kv_heads in (32, 8)],
    "prefill-full": [replace(shape, is_causal=False) for shape in (_GPU_MODELS[0], _GPU_MODELS[2])],
    "prefill-head-dims": [PrefillShape(4, 16, 4, head_dim, 4096) for head_dim in (96, 256)],
}  # fmt: skip
QUICK_PREFILL = [PrefillShape(1, 32, 32, 128, 512), PrefillShape(1, 32, 8, 128, 1024)]

_HYBRID = HybridShape(8, 32, 8, 128, 2048, 256, 0)
_SERVING = HybridShape(32, 32, 8, 128, 4096, 128, 0)
_SERVING_MHA = HybridShape(16, 32, 32, 128, 2048, 512, 0)
FRACTIONS = (0, 25, 50, 75, 100)


def at_every_fraction(shape: HybridShape) -> list[HybridShape]:
    return [replace(shape, prefill_percent=percent) for percent in FRACTIONS]


HYBRID_SETS: dict[str, list[HybridShape]] = {
    "hybrid": at_every_fraction(_HYBRID),
    "hybrid-mha": at_every_fraction(replace(_HYBRID, num_kv_heads=32)),
    "hybrid-serving": at_every_fraction(_SERVING),
    "hybrid-serving-mha": at_every_fraction(_SERVING_MHA),
}
QUICK_HYBRID = [replace(_HYBRID, chunk=64, prefill_percent=percent) for percent in (0, 50)]

# The sets that a device is measured on unless others are named.
DEFAULT_SETS = {
    ("cpu", "prefill"): "prefill",
    ("cpu", "hybrid"): "hybrid",
    ("cuda", "prefill"): "prefill-models,prefill-ragged,prefill-full,prefill-head-dims",
    ("cuda", "hybrid"): "hybrid-serving,hybrid-serving-mha",
}


def set_of(shape: PrefillShape | HybridShape) -> str:
    """The set that a shape belongs to, the first of several; empty for a shape of the caller's own."""
    sets = PREFILL_SETS if isinstance(shape, PrefillShape) else HYBRID_SETS
    return next((name for name, shapes in sets.items() if shape in shapes), "")


def parse_prefill_shapes(text: str) -> list[PrefillShape]:
    """Shapes from a comma-separated list of set names or batch:q_heads:kv_heads:head_dim:length."""
    shapes = []
    for item in text.split(","):
        names = "batch:q_heads:kv_heads:head_dim:length"
        shapes += PREFILL_SETS[item] if item in PREFILL_SETS else [PrefillShape(*parse_sizes(item, names))]
    return list(dict.fromkeys(shapes))


def parse_hybrid_shapes(text: str) -> list[HybridShape]:
    """Shapes from a list of set names or batch:q_heads:kv_heads:head_dim:kv_len:chunk:prefill_percent."""
    shapes = []
    for item in text.split(","):
        names = "batch:q_heads:kv_heads:head_dim:kv_len:chunk:prefill_percent"
        shapes += HYBRID_SETS[item] if item in HYBRID_SETS else [HybridShape(*parse_sizes(item, names))]
    return list(dict.fromkeys(shapes))
