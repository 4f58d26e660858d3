"""Models with random weights to generate with: the sizes of a real one, and what a cache of it is filled with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIZES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 5e5,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rope_theta": 5e5,
    },
    "tiny": {
        "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rope_theta": 1e4,
    },
}  # fmt: skip
MAX_POSITIONS = 131072


@dataclass(frozen=True)
class GenerateShape:
    """Decoding steps of one token per sequence, with `context` tokens in the cache before the first."""

    model: str
    batch_size: int
    context: int

    @property
    def label(self) -> str:
        return f"{self.model} {self.batch_size} x {self.context}"

    def sizes(self) -> dict[str, object]:
        return {"model": self.model, "batch_size": self.batch_size, "context": self.context}


_LARGE = [GenerateShape("llama-3.1-8b", batch, length) for batch in (1, 8) for length in (2048, 8192, 32768)]
_SMALL = [GenerateShape("llama-3.2-1b", 1, length) for length in (2048, 8192)]
SETS = {"generate-gpu": _LARGE, "generate-cpu": _SMALL}
DEFAULT_SET = {"cuda": "generate-gpu", "cpu": "generate-cpu"}
QUICK = [GenerateShape("tiny", 1, 64), GenerateShape("tiny", 3, 32)]


def parse_shapes(text: str) -> list[GenerateShape]:
    """Names of sets, or `model:batch:context`, comma-separated."""
    shapes: list[GenerateShape] = []
    for part in text.split(","):
        if part in SETS:
            shapes.extend(SETS[part])
            continue
        model, *counts = part.split(":")
        if model not in SIZES or len(counts) != 2 or not all(count.isdigit() and int(count) for count in counts):
            names = ", ".join((*SETS, *SIZES))
            raise ValueError(f"--shapes: must be a set or model:batch:context, of {names}, got {part!r}")
        shapes.append(GenerateShape(model, int(counts[0]), int(counts[1])))
    return shapes


def set_of(shape: GenerateShape) -> str:
    return next((name for name, shapes in SETS.items() if shape in shapes), "other")


def make_model(name: str, device: str) -> Any:
    """A Llama with random weights, made on the device: bfloat16, as checkpoints are; float32 on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(SIZES[name])
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    config = LlamaConfig(
        **{"tie_word_embeddings": True} | sizes, max_position_embeddings=MAX_POSITIONS, rope_parameters=rope
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def random_kv(model: Any, shape: GenerateShape, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """K and V [B, H, context, D] of each layer, standard normal."""
    config = model.config
    generator = torch.Generator(model.device).manual_seed(seed)
    size = (shape.batch_size, config.num_key_value_heads, shape.context, config.head_dim)
    for _ in range(config.num_hidden_layers):
        k, v = (torch.randn(size, device=model.device, dtype=model.dtype, generator=generator) for _ in range(2))
        yield k, v
