"""Decode shapes measured on a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class DecodeShape:
    """One decode step. `cv`: coefficient of variation of log-normal lengths around kv_len; 0 is a uniform batch."""

    name: str
    batch_size: int
    kv_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int = 128
    page_size: int = 16
    num_q_tokens: int = 1
    cv: float = 0.0

    @property
    def label(self) -> str:
        parts = [f"{self.name} {self.batch_size} x {self.kv_len}, {self.num_q_heads}/{self.num_kv_heads}"]
        if self.head_dim != 128:
            parts.append(f"D={self.head_dim}")
        if self.page_size != 16:
            parts.append(f"page {self.page_size}")
        if self.num_q_tokens != 1:
            parts.append(f"{self.num_q_tokens} tokens")
        if self.cv:
            parts.append(f"ragged CV {self.cv:g}")
        return ", ".join(parts)


# The shapes that docs/performance.md compares with other libraries.
MODELS = [
    DecodeShape("llama2-7b", 1, 4096, 32, 32),
    DecodeShape("llama2-7b", 16, 4096, 32, 32),
    DecodeShape("llama2-7b", 128, 1024, 32, 32),
    DecodeShape("llama2-7b", 128, 128, 32, 32),
    DecodeShape("llama3-8b", 1, 32768, 32, 8),
    DecodeShape("llama3-8b", 1, 131072, 32, 8),
    DecodeShape("llama3-8b", 8, 8192, 32, 8),
    DecodeShape("llama3-8b", 64, 4096, 32, 8),
    DecodeShape("llama3-8b", 256, 1024, 32, 8),
    DecodeShape("llama3-70b", 1, 8192, 64, 8),
    DecodeShape("llama3-70b", 32, 8192, 64, 8),
    DecodeShape("MQA", 32, 8192, 32, 1),
]

_GQA = DecodeShape("llama3-8b", 64, 4096, 32, 8)
_MHA = DecodeShape("llama2-7b", 16, 4096, 32, 32)

RAGGED = [replace(shape, cv=1.0) for shape in (_MHA, _GQA, MODELS[8], MODELS[6])]
HEAD_DIMS = [replace(_GQA, name="GQA", head_dim=d) for d in (64, 80, 96, 192, 256)] + [
    replace(_MHA, name="MHA", head_dim=d) for d in (64, 80, 96, 192, 256)
]
GROUPS = [DecodeShape("group", 32, 4096, 8 * group, 8) for group in (1, 4, 5, 7, 8, 12)] + [
    DecodeShape("group", 128, 4096, group, 1) for group in (32, 71)
]
PAGES = [replace(_GQA, name="page", page_size=p) for p in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
TOKENS = [replace(_GQA, name="verify", num_q_tokens=n) for n in (2, 4, 8, 16)]
GRID = [
    DecodeShape("grid", batch, length, 32, 8)
    for batch in (1, 8, 64)
    for length in (256, 1024, 4096, 16384)
    if batch * length <= 1 << 19
]

SETS: dict[str, list[DecodeShape]] = {
    "models": MODELS,
    "ragged": RAGGED,
    "head_dims": HEAD_DIMS,
    "groups": GROUPS,
    "pages": PAGES,
    "tokens": TOKENS,
    "grid": GRID,
}
QUICK = [MODELS[0], MODELS[4]]
DEFAULT_SETS = ",".join(SETS)


def parse_shapes(text: str) -> list[tuple[str, DecodeShape]]:
    """(set, shape) from a comma-separated list of set names or batch:q_heads:kv_heads:head_dim:kv_len[:page_size]."""
    shapes: list[tuple[str, DecodeShape]] = []
    for item in text.split(","):
        if item in SETS:
            shapes += [(item, shape) for shape in SETS[item]]
            continue
        sizes = item.split(":")
        if not (5 <= len(sizes) <= 6 and all(size.isdigit() and int(size) > 0 for size in sizes)):
            raise ValueError(
                f"--shapes: an item must be one of {', '.join(SETS)} or "
                f"batch:q_heads:kv_heads:head_dim:kv_len[:page_size], got {item}"
            )
        batch, q_heads, kv_heads, head_dim, kv_len, page_size = (*map(int, sizes), 16)[:6]
        shapes.append(("own", DecodeShape("own", batch, kv_len, q_heads, kv_heads, head_dim, page_size)))
    return shapes
