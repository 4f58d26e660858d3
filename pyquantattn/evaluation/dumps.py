"""q, K and V that someone else wrote: .npz or .safetensors.

Names are ``q``, ``k``, ``v``, or ``<layer>.q`` and so on for several layers; q ``[n, Hq, D]`` belongs to the last n
tokens, k and v ``[L, Hkv, D]`` to all. Optional beside them: ``sm_scale``, ``sliding_window``, ``logits_soft_cap``
(numbers), ``alibi_slopes``, ``sinks`` (``[Hq]``).
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyquantattn.evaluation.exact import AttentionOptions
from pyquantattn.evaluation.language_model import LayerTensors

NUMBERS, VECTORS = ("sm_scale", "logits_soft_cap", "sliding_window"), ("alibi_slopes", "sinks")
NAMES = ("q", "k", "v", *NUMBERS, *VECTORS)


def load_dump(path: Path) -> list[LayerTensors]:
    """Every layer of a file, in the order of their numbers.

    Raises:
        ValueError: the file has no q, k and v, their shapes do not fit together, or it holds what has no meaning here.
    """
    tensors = _read(path)
    prefixes = sorted({name.removesuffix("k") for name in tensors if name.rpartition(".")[2] == "k"}, key=_natural)
    if not prefixes:
        raise ValueError(
            f"evaluate: a dump must hold arrays named q, k and v, got {', '.join(sorted(tensors))} in {path}"
        )
    known = {prefix + name for prefix in prefixes for name in NAMES}
    if unknown := sorted(tensors.keys() - known):
        raise ValueError(f"evaluate: each layer of a dump may hold {', '.join(NAMES)}, got {unknown[0]} in {path}")
    return [_layer(path, prefix, tensors) for prefix in prefixes]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".npz":
        try:
            with np.load(path) as arrays:
                return {name: torch.from_numpy(np.atleast_1d(arrays[name])) for name in arrays.files}
        except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"evaluate: a dump must hold arrays of numbers, got {path}: {error}") from error
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError  # an extra
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"evaluate: a dump must hold arrays of numbers, got {path}: {error}") from error
    raise ValueError(f"evaluate: a dump must be a .npz or .safetensors file, got {path}")


def _layer(path: Path, prefix: str, tensors: dict[str, Tensor]) -> LayerTensors:
    missing = [name for name in "qkv" if prefix + name not in tensors]
    if missing:
        raise ValueError(
            f"evaluate: a dump must hold q, k and v of every layer, {prefix}{missing[0]} is missing in {path}"
        )
    q, k, v = (_as_attention_dtype(tensors[prefix + name]) for name in "qkv")
    fits = q.ndim == k.ndim == 3 and k.shape == v.shape and q.shape[2] == k.shape[2] and len(k) >= len(q) > 0
    if not fits or q.shape[1] % k.shape[1]:
        shapes = f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        raise ValueError(
            f"evaluate: q, k, v must be [n, Hq, D], [L, Hkv, D], [L, Hkv, D] with n <= L, got {shapes} in {path}"
        )
    for name, x in zip("qkv", (q, k, v), strict=True):
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"evaluate: {prefix}{name} must be finite, got NaN or infinite values in {path}")
    options = {name: tensors[prefix + name] for name in (*NUMBERS, *VECTORS) if prefix + name in tensors}
    label = prefix.removesuffix(".") or path.stem
    return LayerTensors(label, q, k, v, _options(options, q.shape[1], path))


def _options(given: dict[str, Tensor], num_heads: int, path: Path) -> AttentionOptions:
    for name, x in given.items():
        size = 1 if name in NUMBERS else num_heads
        if x.numel() != size or not bool(torch.isfinite(x).all()) or (name in NUMBERS and not bool(x > 0)):
            rule = "one positive number" if name in NUMBERS else f"{size} numbers, one for each query head"
            raise ValueError(f"evaluate: {name} must be {rule}, got {x.tolist()} in {path}")
    found = AttentionOptions()
    if "alibi_slopes" in given:
        found["alibi_slopes"] = given["alibi_slopes"].float().flatten()
    if "sinks" in given:
        found["sinks"] = given["sinks"].float().flatten()
    if "sm_scale" in given:
        found["sm_scale"] = float(given["sm_scale"].item())
    if "logits_soft_cap" in given:
        found["logits_soft_cap"] = float(given["logits_soft_cap"].item())
    if "sliding_window" in given:
        found["sliding_window"] = int(given["sliding_window"].item())
    return found


def _as_attention_dtype(x: Tensor) -> Tensor:
    return x.float().contiguous() if x.dtype == torch.float64 or not x.is_floating_point() else x.contiguous()
