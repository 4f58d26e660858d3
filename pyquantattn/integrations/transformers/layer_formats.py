"""Which KV format, scales and key offset each layer gets, and those that are taken from a prompt."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyquantattn.formats import KvFormat, kv_pair
from pyquantattn.key_offset import estimate_k_offset

# A name for all layers, one name for each layer, or a rule (layer_idx, num_layers) -> name.
LayerFormats = str | Sequence[str] | Callable[[int, int], str]
# A scale for all layers, or one for each layer; None: dynamic, or taken from the first tokens.
LayerScales = Tensor | float | Sequence[Tensor | float] | None
# An offset for all layers, or one for each layer; "prompt": taken from the first tokens; None: nothing.
LayerOffsets = Tensor | str | Sequence[Tensor | str | None] | None
OFFSET_OF_PROMPT = "prompt"
# The mean of fewer tokens would be theirs more than their head's.
_MIN_OFFSET_TOKENS = 32
GRANULARITIES = ("token", "head", "tensor")


def keep_edges(kv_format: str, first: int, last: int, edge_format: str = "fp16") -> Callable[[int, int], str]:
    """A rule that gives the first and last layers, often the most sensitive ones, another format.

    Args:
        kv_format: of the layers between.
        first, last: how many layers at each end, at least 0.
        edge_format: of those layers.

    Raises:
        ValueError: a count is negative or a format unknown.

    >>> rule = keep_edges("int8", first=1, last=1)
    >>> [rule(layer_idx, 4) for layer_idx in range(4)]
    ['fp16', 'int8', 'int8', 'fp16']
    """
    for name, count in (("first", first), ("last", last)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"keep_edges: {name} must be an int of at least 0, got {count!r}")
    for name in (kv_format, edge_format):
        kv_pair(name, "keep_edges")

    def rule(layer_idx: int, num_layers: int) -> str:
        is_edge = layer_idx < first or layer_idx >= num_layers - last
        return edge_format if is_edge else kv_format

    return rule


def formats_of_layers(kv_format: LayerFormats, num_layers: int) -> list[str]:
    """One checked format name for each layer.

    >>> formats_of_layers("int8", 2)
    ['int8', 'int8']
    """
    if isinstance(kv_format, str):
        names = [kv_format] * num_layers
    elif callable(kv_format):
        names = [kv_format(layer_idx, num_layers) for layer_idx in range(num_layers)]
    elif isinstance(kv_format, Sequence):
        names = list(kv_format)
    else:
        raise ValueError(f"QuantizedCache: kv_format must be a name, a list of names or a rule, got {kv_format!r}")
    if len(names) != num_layers:
        raise ValueError(
            f"QuantizedCache: kv_format must name a format for each of {num_layers} layers, got {len(names)}"
        )
    return [kv_pair(name, "QuantizedCache").name for name in names]


def scales_of_layers(scale: LayerScales, num_layers: int, name: str) -> list[Tensor | float | None]:
    """One scale for each layer."""
    if scale is None or isinstance(scale, (Tensor, int, float)):
        return [scale] * num_layers
    if not isinstance(scale, Sequence):
        raise ValueError(f"QuantizedCache: {name} must be a scale or a list of scales, got {scale!r}")
    scales: list[Tensor | float | None] = list(scale)
    if len(scales) != num_layers:
        raise ValueError(
            f"QuantizedCache: {name} must have one scale for each of {num_layers} layers, got {len(scales)}"
        )
    return scales


def offsets_of_layers(k_offset: LayerOffsets, num_layers: int) -> list[Tensor | str | None]:
    """One key offset for each layer: a tensor, ``"prompt"`` or None.

    >>> offsets_of_layers("prompt", 2)
    ['prompt', 'prompt']
    """
    if k_offset is None or isinstance(k_offset, (Tensor, str)):
        offsets: list[Tensor | str | None] = [k_offset] * num_layers
    else:
        offsets = list(k_offset) if isinstance(k_offset, Sequence) else []
    if not all(_is_offset(offset) for offset in offsets) or not isinstance(k_offset, (Tensor, Sequence, type(None))):
        raise ValueError(
            f'QuantizedCache: k_offset must be a tensor, "prompt", None or a list of those, got {k_offset!r}'
        )
    if len(offsets) != num_layers:
        raise ValueError(
            f"QuantizedCache: k_offset must have one offset for each of {num_layers} layers, got {len(offsets)}"
        )
    return offsets


def _is_offset(offset: object) -> bool:
    return offset is None or isinstance(offset, Tensor) or (isinstance(offset, str) and offset == OFFSET_OF_PROMPT)


def prompt_offset(key_states: Tensor) -> Tensor:
    """The mean key of a prompt ``[B, H, n, D]`` as float32 ``[H, D]``; zeros where it has too few tokens for a mean."""
    batch_size, num_heads, num_tokens, head_dim = key_states.shape
    if batch_size * num_tokens < _MIN_OFFSET_TOKENS:
        return torch.zeros(num_heads, head_dim, dtype=torch.float32, device=key_states.device)
    return estimate_k_offset(key_states.transpose(1, 2).detach())


def static_scale(x: Tensor, row: KvFormat, granularity: str) -> Tensor:
    """The smallest scale with which no element of ``x`` saturates.

    Args:
        x: ``[B, H, n, D]``.
        row: the format that the scale is for.
        granularity: ``"head"`` or ``"tensor"``.

    Returns:
        float32 ``[H]`` or ``[]``.
    """
    largest_code = torch.iinfo(row.dtype).max if not row.dtype.is_floating_point else torch.finfo(row.dtype).max
    amax = x.abs().amax(dim=(0, 2, 3)) if granularity == "head" else x.abs().amax()
    # A head of zeros still needs a positive scale.
    return (amax.float() / largest_code).clamp_min(torch.finfo(torch.float32).tiny)
