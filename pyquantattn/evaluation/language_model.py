"""What the evaluation asks of a language model: its logits, with the attention in the evaluation's hands."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Unpack

from pyquantattn.evaluation.exact import AttentionOptions, full_text_attention


class Attend(Protocol):
    """Attention of new tokens over everything that one sequence has seen, them included.

    q [1, n, Hq, D], k and v [1, n, Hkv, D], with position embedding applied; returns [1, n, Hq, D].
    """

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, /, **options: Unpack[AttentionOptions]
    ) -> Tensor: ...


class LanguageModel(Protocol):
    """One causal language model; a sequence's past lives in the Attend object, never in the model."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> dict[str, object]:
        """What the record needs to name these weights: path, hash, dtype, sizes."""

    @property
    def num_layers(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...

    def logits(self, tokens: Tensor, first_position: int, attend: Attend | None) -> Tensor:
        """[n, vocabulary] for tokens [n] at first_position and after; None: the model's own attention, one pass."""


@dataclass(frozen=True)
class LayerTensors:
    """What one layer computed on a text: q [n, Hq, D] of its last n tokens, k and v [L, Hkv, D] of all."""

    label: str
    q: Tensor
    k: Tensor
    v: Tensor
    options: AttentionOptions

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return len(self.k)

    @property
    def first_query(self) -> int:
        """Position of q[0]."""
        return len(self.k) - len(self.q)

    def description(self) -> dict[str, object]:
        """Label, shapes and hash: what the record needs to name these tensors."""
        digest = hashlib.sha256()
        for x in (self.q, self.k, self.v):
            digest.update(x.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        options = {
            name: value.tolist() if isinstance(value, Tensor) else value for name, value in sorted(self.options.items())
        }
        shapes = {"q": list(self.q.shape), "k": list(self.k.shape)}
        return {"label": self.label, **shapes, "options": options, "sha256": digest.hexdigest()}


class Capture:
    """Attention of a whole text over itself that keeps what every layer was given."""

    def __init__(self) -> None:
        self.layers: list[LayerTensors] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, /, **options: Unpack[AttentionOptions]) -> Tensor:
        self.layers.append(LayerTensors(str(layer), q[0], k[0], v[0], options))
        return full_text_attention(q[0], k[0], v[0], options)[None]


def capture(model: LanguageModel, tokens: Tensor) -> list[LayerTensors]:
    """Every layer's q, k and v of a text [n]: float32 attention, nothing quantised."""
    attention = Capture()
    model.logits(tokens, 0, attention)
    return attention.layers
