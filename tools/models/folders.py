"""The models of this folder, by name."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .llama import Llama
from .mpt import Mpt

MODELS = Path(__file__).resolve().parent
DEFAULT = "pybyte-8m"
Network = Llama | Mpt


def names() -> list[str]:
    """Of all models here, the default first."""
    found = sorted(config.parent.name for config in MODELS.glob("*/config.json"))
    return sorted(found, key=lambda name: name != DEFAULT)


def load(folder: Path, device: str | torch.device = "cpu") -> Network:
    """The network of a folder, in float32."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    return (Mpt if model_type == "mpt" else Llama).load(folder, device)
