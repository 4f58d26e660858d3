"""What contenders of the CUDA benchmark have in common, whatever the operation."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from .results import Row

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What takes part."""

    kv_formats: list[str]  # also `int8 static`: one scale for each KV head; to prefill also `fresh fp16`
    peers: list[str]  # parts of peers' names


def attempt(make: Callable[[], T]) -> T | Row:
    """What `make` returns, or a row with the reason why there is nothing: a peer's own limits are a result, whatever
    it raises."""
    try:
        return make()
    except Exception as failure:
        text = " ".join(str(failure).replace(str(Path.home()), "~").split())
        return {"failure": f"{type(failure).__name__}: {text[:160]}"}


def release() -> None:
    """Gives memory that nothing refers to back to the device, for contenders that allocate by other means."""
    gc.collect()
    torch.cuda.empty_cache()
