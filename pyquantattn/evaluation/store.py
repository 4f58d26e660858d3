"""Finished parts of a run on disk, so that an interrupted run goes on where it was and gives the same figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


def fingerprint(description: object) -> str:
    """Names everything that decides a result; parts of another run are never mistaken for this one's."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()[:16]


class PartStore:
    """Named groups of arrays in one folder."""

    def __init__(self, folder: Path, description: object) -> None:
        self._folder = folder / f"parts-{fingerprint(description)}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self.num_found = 0  # parts that an earlier run has left

    def load_or_make(self, name: str, make: Callable[[], Arrays]) -> tuple[Arrays, bool]:
        """The arrays called `name`, and whether they were there already."""
        path = self._folder / f"{name}.npz"
        if path.exists():
            self.num_found += 1
            with np.load(path) as arrays:
                return {key: arrays[key] for key in arrays.files}, True
        made = make()
        partial = path.with_suffix(".partial")
        columns: dict[str, Any] = dict(made)
        with partial.open("wb") as file:
            np.savez(file, **columns)
        partial.replace(path)  # a part is whole or absent
        return made, False
