"""q, K and V that someone else wrote: .npz or .safetensors.

Names are ``q``, ``k``, ``v``, or ``<layer>.q`` and so on for several layers; q ``[n, Hq, D]`` belongs to the last n
tokens, k and v ``[L, Hkv, D]`` to all. Optional beside them: ``sm_scale``, ``sliding_window``, ``logits_soft_cap``
(numbers), ``alibi_slopes``, ``sinks`` (``[Hq]``).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyquantattn.evaluation.exact import AttentionOptions
from pyquantattn.evaluation.language_model import LayerTensors


def load_dump(path: Path) -> list[LayerTensors]:
    """Every layer of a file, in the order of their numbers.

    Raises:
        ValueError: the file has no q, k and v, or their shapes do not fit together.
    """
    tensors = _read(path)
    prefixes = sorted({name.removesuffix("k") for name in tensors if name.rpartition(".")[2] == "k"}, key=_natural)
    if not prefixes:
        raise ValueError(
            f"evaluate: a dump must hold arrays named q, k and v, got {', '.join(sorted(tensors))} in {path}"
        )
    return [_layer(path, prefix, tensors) for prefix in prefixes]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: torch.from_numpy(np.atleast_1d(arrays[name])) for name in arrays.files}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # an extra

        return dict(load_file(path))
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
    label = prefix.removesuffix(".") or path.stem
    return LayerTensors(label, q, k, v, _options(prefix, tensors))


def _options(prefix: str, tensors: dict[str, Tensor]) -> AttentionOptions:
    found = AttentionOptions()
    if (slopes := tensors.get(prefix + "alibi_slopes")) is not None:
        found["alibi_slopes"] = slopes.float()
    if (sinks := tensors.get(prefix + "sinks")) is not None:
        found["sinks"] = sinks.float()
    if (scale := tensors.get(prefix + "sm_scale")) is not None:
        found["sm_scale"] = float(scale.item())
    if (cap := tensors.get(prefix + "logits_soft_cap")) is not None:
        found["logits_soft_cap"] = float(cap.item())
    if (window := tensors.get(prefix + "sliding_window")) is not None:
        found["sliding_window"] = int(window.item())
    return found


def _as_attention_dtype(x: Tensor) -> Tensor:
    return x.float().contiguous() if x.dtype == torch.float64 or not x.is_floating_point() else x.contiguous()
