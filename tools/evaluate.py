#!/usr/bin/env python3
"""Accuracy against memory of KV formats: the command pyquantattn-evaluate, with this repository's models built in.

python tools/evaluate.py                              pybyte-8m on held-out text of the standard library
python tools/evaluate.py --built-in NAME              another one of tools/models
python tools/evaluate.py --model DIR --text FILE      a Hugging Face model folder on your text
python tools/evaluate.py --profiles                   synthetic tensors
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from models.attention import causal_attention
from models.corpus import held_out_texts
from models.folders import DEFAULT, MODELS, Network, load, names
from torch import Tensor

import pyquantattn
from pyquantattn.evaluation.command import main
from pyquantattn.evaluation.huggingface import hash_weights
from pyquantattn.evaluation.language_model import Attend
from pyquantattn.evaluation.run import Text


@dataclass(frozen=True)
class BuiltInModel:
    """One of tools/models, as pyquantattn.evaluation.language_model.LanguageModel; a token is a byte."""

    folder: Path
    network: Network
    device: torch.device
    dtype: torch.dtype = torch.float32

    @classmethod
    def load(cls, name: str, device: str) -> BuiltInModel:
        folder = MODELS / name
        return cls(folder, load(folder, device), torch.device(device))

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def identity(self) -> dict[str, object]:
        sizes = self.network.config.to_json()
        return {
            "class": type(self.network).__name__,
            "folder": self.name,
            "dtype": str(self.dtype),
            "sha256": hash_weights(self.folder),
            "config": sizes,
        }

    @property
    def num_layers(self) -> int:
        return self.network.config.num_hidden_layers

    @property
    def max_length(self) -> int:
        return self.network.config.max_position_embeddings

    def logits(self, tokens: Tensor, first_position: int, attend: Attend | None) -> Tensor:
        positions = torch.arange(first_position, first_position + len(tokens), device=self.device)
        return self.network(tokens[None], positions, causal_attention if attend is None else attend)[0]

    def tokenize(self, text: str) -> Tensor:
        return torch.tensor(list(text.encode()), device=self.device)

    def texts(self, count: int, length: int) -> list[Text]:
        """Passages that no model of this repository was trained on."""
        return [
            Text(name, torch.tensor(list(passage), device=self.device))
            for name, passage in held_out_texts(count, length)
        ]


def load_built_in(name: str, device: str) -> BuiltInModel:
    """One of tools/models; its matrix products are too small to share among threads, decode_attention is not."""
    pyquantattn.set_num_threads(torch.get_num_threads())
    torch.set_num_threads(1)
    return BuiltInModel.load(name, device)


def choose_built_in(arguments: list[str]) -> tuple[str, list[str]]:
    """The name behind --built-in, and the arguments that are left for the command."""
    parser = argparse.ArgumentParser(prog="evaluate", add_help=False, allow_abbrev=False)
    parser.add_argument("--built-in", choices=names(), default=DEFAULT)
    found, rest = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(rest):
        print(f"--built-in NAME: one of {', '.join(names())} (default: {DEFAULT}); all other options:\n")
    return found.built_in, rest


if __name__ == "__main__":
    chosen, others = choose_built_in(sys.argv[1:])
    sys.exit(main(others, built_in=partial(load_built_in, chosen)))
