"""Prefill and hybrid batches to measure, in named sets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise


def parse_sizes(item: str, names: str) -> list[int]:
    """The numbers of `4:32:8` for names such as `batch:q_heads:kv_heads`."""
    sizes = item.split(":")
    if len(sizes) != len(names.split(":")) or not all(size.isdigit() for size in sizes):
        raise ValueError(f"--shapes: an item must be the name of a set or {names}, got {item}")
    return [int(size) for size in sizes]


@dataclass(frozen=True)
class PrefillShape:
    """Whole prompts of equal lengths, causal."""

    batch_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    length: int

    @property
    def label(self) -> str:
        return f"{self.batch_size} x {self.length}, {self.num_q_heads}/{self.num_kv_heads}, D={self.head_dim}"

    @property
    def flop(self) -> int:
        """Two for each product of q and K or of p and V; masked scores are not counted."""
        scores = self.length * (self.length + 1) // 2
        return 4 * self.batch_size * self.num_q_heads * self.head_dim * scores


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
    def flop(self) -> int:
        scores = sum(count * self.kv_len - count * (count - 1) // 2 for count in self.query_counts)
        return 4 * self.num_q_heads * self.head_dim * scores


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
}  # fmt: skip
QUICK_PREFILL = [PrefillShape(1, 32, 32, 128, 512), PrefillShape(1, 32, 8, 128, 1024)]

_HYBRID = HybridShape(8, 32, 8, 128, 2048, 256, 0)
FRACTIONS = (0, 25, 50, 75, 100)
HYBRID_SETS: dict[str, list[HybridShape]] = {
    "hybrid": [replace(_HYBRID, prefill_percent=percent) for percent in FRACTIONS],
    "hybrid-mha": [replace(_HYBRID, num_kv_heads=32, prefill_percent=percent) for percent in FRACTIONS],
}
QUICK_HYBRID = [replace(_HYBRID, chunk=64, prefill_percent=percent) for percent in (0, 50)]


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
