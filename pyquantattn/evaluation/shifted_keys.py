"""A model whose keys carry a constant vector: the same predictions in full precision, a fragile cache.

A constant added to every key of a head adds one number to all scores of a query, which the softmax takes out again. So
the change costs what its storage costs and nothing else. Any model can be given the offsets of one with a large key
bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from pyquantattn.evaluation.exact import AttentionOptions
from pyquantattn.evaluation.language_model import Attend, LanguageModel
from pyquantattn.evaluation.profiles import channel_offsets

NUM_CHANNELS = 3
SPREAD = 0.25  # offsets are drawn from the given magnitude, more or less by this share


@dataclass(frozen=True)
class ShiftedKeys:
    """`model` with offsets of about `magnitude` in a few key channels of every head, where it is run with an Attend.

    Its own attention (no Attend) stays as it is, so that the control against it proves that nothing else has changed.
    """

    model: LanguageModel
    magnitude: float

    def logits(self, tokens: Tensor, first_position: int, attend: Attend | None) -> Tensor:
        """See LanguageModel."""
        if attend is None:
            return self.model.logits(tokens, first_position, None)

        def shifted(layer: int, q: Tensor, k: Tensor, v: Tensor, /, **options: Unpack[AttentionOptions]) -> Tensor:
            absolute = [name for name in ("logits_soft_cap", "sinks") if options.get(name) is not None]
            if absolute:
                raise ValueError(f"evaluate: --shift-keys needs scores that may all move alike, got {absolute[0]}")
            return attend(layer, q, k + self._offsets(layer, k), v, **options)

        return self.model.logits(tokens, first_position, shifted)

    def _offsets(self, layer: int, k: Tensor) -> Tensor:
        bounds = ((1 - SPREAD) * self.magnitude, (1 + SPREAD) * self.magnitude)
        generator = torch.Generator().manual_seed(layer)
        return channel_offsets(k.shape[-2], k.shape[-1], NUM_CHANNELS, bounds, generator).to(k)

    @property
    def name(self) -> str:
        """The model's, and what was done to it."""
        return f"{self.model.name}, keys shifted by {self.magnitude:g}"

    @property
    def identity(self) -> dict[str, object]:
        """The model's, and what was done to it."""
        return {**self.model.identity, "key_shift": self.magnitude}

    @property
    def num_layers(self) -> int:
        """The model's."""
        return self.model.num_layers

    @property
    def max_length(self) -> int:
        """The model's."""
        return self.model.max_length

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.device
