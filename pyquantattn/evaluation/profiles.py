"""Synthetic q, K and V with published statistics: fragile cases without big weights.

gaussian         independent normal values: the easy case, with known errors
channel_outliers two key channels of each head with an offset of 25 to 40 standard deviations (as in Llama: KIVI,
                 arXiv:2402.02750)
key_bias         three key channels with an offset of 90 to 150 (a projection bias as large as that of Qwen2.5)
sinks            four first tokens that take most of the weight and carry next to no value (arXiv:2309.17453)
heavy_tails      Student t with two degrees of freedom, in K and V
tiny             keys and values of 1e-3, queries as much larger
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyquantattn.evaluation.language_model import LayerTensors

NUM_QUERIES, NUM_KV_HEADS, GROUP, HEAD_DIM = 16, 2, 2, 128
OF_THE_LAYER = ("channel_outliers", "key_bias", "sinks")  # what is drawn after q, K and V is the same for every text
PROFILES = ("gaussian", "channel_outliers", "key_bias", "sinks", "heavy_tails", "tiny")


def make_profile(name: str, length: int = 4096, seed: int = 0, text: int = 0) -> LayerTensors:
    """One layer's tensors; the same arguments give the same bits. What belongs to the layer (its offsets, the direction
    of its sinks) depends on the seed alone, the rest also on the text.

    >>> make_profile("tiny", length=64).k.shape
    torch.Size([64, 2, 128])
    """
    if name not in PROFILES:
        raise ValueError(f"evaluate: profile must be one of {', '.join(PROFILES)}, got {name!r}")
    generator = torch.Generator().manual_seed(1000 * seed + PROFILES.index(name))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        q = normal(NUM_QUERIES, NUM_KV_HEADS * GROUP, HEAD_DIM)
        return q, normal(length, NUM_KV_HEADS, HEAD_DIM), normal(length, NUM_KV_HEADS, HEAD_DIM)

    q, k, v = draw()
    if text:
        layer_state = generator.get_state()
        generator.manual_seed(1000 * seed + 100 * text + PROFILES.index(name))
        q, k, v = draw()
        if name in OF_THE_LAYER:
            generator.set_state(layer_state)
    if name == "channel_outliers":
        k = k + channel_offsets(NUM_KV_HEADS, HEAD_DIM, 2, (25.0, 40.0), generator)
    elif name == "key_bias":
        k = k + channel_offsets(NUM_KV_HEADS, HEAD_DIM, 3, (90.0, 150.0), generator)
    elif name == "sinks":
        direction = torch.nn.functional.normalize(normal(NUM_KV_HEADS, HEAD_DIM), dim=-1)
        # The score of a sink is 3 * 40 / sqrt(128), 10 above the mean of the others.
        q = q + 3.0 * direction.repeat_interleave(GROUP, 0)
        k[:4], v[:4] = 40.0 * direction, 0.01 * v[:4]
    elif name == "heavy_tails":
        k, v = (x * (2.0 / _chi_square(x, generator)).sqrt() for x in (k, v))
    elif name == "tiny":
        q, k, v = 1e3 * q, 1e-3 * k, 1e-3 * v
    return LayerTensors(name, q, k, v, {})


def channel_offsets(
    num_heads: int, head_dim: int, count: int, bounds: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """[num_heads, head_dim], zero but for `count` channels of each head, whose magnitudes lie within `bounds`."""
    low, high = bounds
    offsets = torch.zeros(num_heads, head_dim)
    for head in range(num_heads):
        channels = torch.randperm(head_dim, generator=generator)[:count]
        signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
        offsets[head, channels] = signs * (low + (high - low) * torch.rand(count, generator=generator))
    return offsets


def _chi_square(like: Tensor, generator: torch.Generator) -> Tensor:
    """Two degrees of freedom: an exponential variable."""
    return -2.0 * torch.rand(like.shape, generator=generator).clamp_min(1e-12).log()
