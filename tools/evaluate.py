#!/usr/bin/env python3
"""Accuracy against memory of KV formats: the command pyquantattn-evaluate, with this repository's small model built in.

python tools/evaluate.py                              the built-in model on held-out text of the standard library
python tools/evaluate.py --model DIR --text FILE      a Hugging Face model folder on your text
python tools/evaluate.py --profiles                   synthetic tensors
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from models.corpus import held_out_texts
from models.llama import Llama, causal_attention
from torch import Tensor

import pyquantattn
from pyquantattn.evaluation.command import main
from pyquantattn.evaluation.huggingface import hash_weights
from pyquantattn.evaluation.language_model import Attend
from pyquantattn.evaluation.run import Text

MODELS = Path(__file__).resolve().parent / "models"
DEFAULT_MODEL = "pybyte-8m"


@dataclass(frozen=True)
class BuiltInModel:
    """One of tools/models, as pyquantattn.evaluation.language_model.LanguageModel; a token is a byte."""

    folder: Path
    llama: Llama
    device: torch.device
    dtype: torch.dtype = torch.float32

    @classmethod
    def load(cls, name: str, device: str) -> BuiltInModel:
        folder = MODELS / name
        return cls(folder, Llama.load(folder, device), torch.device(device))

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def identity(self) -> dict[str, object]:
        sizes = self.llama.config.to_json()
        return {
            "class": "Llama",
            "folder": self.name,
            "dtype": str(self.dtype),
            "sha256": hash_weights(self.folder),
            "config": sizes,
        }

    @property
    def num_layers(self) -> int:
        return self.llama.config.num_hidden_layers

    @property
    def max_length(self) -> int:
        return self.llama.config.max_position_embeddings

    def logits(self, tokens: Tensor, first_position: int, attend: Attend | None) -> Tensor:
        positions = torch.arange(first_position, first_position + len(tokens), device=self.device)
        return self.llama(tokens[None], positions, causal_attention if attend is None else attend)[0]

    def tokenize(self, text: str) -> Tensor:
        return torch.tensor(list(text.encode()), device=self.device)

    def texts(self, count: int, length: int) -> list[Text]:
        """Passages that no model of this repository was trained on."""
        return [
            Text(name, torch.tensor(list(passage), device=self.device))
            for name, passage in held_out_texts(count, length)
        ]


def load_built_in(device: str) -> BuiltInModel:
    """The default model; its matrix products are too small to share among threads, decode_attention is not."""
    pyquantattn.set_num_threads(torch.get_num_threads())
    torch.set_num_threads(1)
    return BuiltInModel.load(DEFAULT_MODEL, device)


if __name__ == "__main__":
    sys.exit(main(built_in=load_built_in))
