"""A look at the first keys of a cache: offsets that 8 bits store badly are said before any text comes out wrong."""

import warnings

import torch
from torch import Tensor

from pyquantattn.evaluation.fragility import REACH_LIMIT

# Tokens of a sequence that are looked at; fewer than the least say nothing of a mean.
_MOST_TOKENS, _LEAST_TOKENS = 512, 32
_MOST_NAMES = 4


class KeyCheck:
    """Warns once every layer that it watches has seen its first tokens.

    Where all keys of a head share a large vector, it takes the codes' range and what tells tokens apart gets the rest.
    The device is waited for once, at the last layer of the first step. Nothing is checked while compiling or capturing.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._reach: dict[str, Tensor] = {}

    def look(self, layer_name: str, k: Tensor) -> None:
        """At the first keys ``[B, H, n, D]`` of a layer."""
        num_tokens = k.shape[2]
        if num_tokens < _LEAST_TOKENS or torch.compiler.is_compiling() or _is_capturing(k):
            return
        self._reach[layer_name] = _reach(k[:, :, :: -(-num_tokens // _MOST_TOKENS)])
        if len(self._reach) == self._num_layers:
            self._warn()
            self._reach.clear()

    def _warn(self) -> None:
        reach = torch.stack([value.cpu() for value in self._reach.values()]).tolist()
        fragile = {name: value for name, value in zip(self._reach, reach, strict=True) if value > REACH_LIMIT}
        if not fragile:
            return
        names = ", ".join(list(fragile)[:_MOST_NAMES]) + (" and others" if len(fragile) > _MOST_NAMES else "")
        warnings.warn(
            f"QuantizedCache: keys of {names} share offsets of up to {max(fragile.values()):.0f} times what tells them "
            'apart, and 8 bits keep little of the rest; give k_offset="prompt", or keep K of these layers in 16 bits',
            stacklevel=2,
        )


def _reach(k: Tensor) -> Tensor:
    """The largest element of a key over its distance from the mean key (mean of a head's tokens, of the worst head); 0
    where keys are not much larger than that because of an offset, but have heavy tails."""
    k = k.float()
    largest, tiny = k.abs().amax(-1), torch.finfo(torch.float32).tiny
    reach, crest = (
        (largest / x.square().mean(-1).sqrt().clamp_min(tiny)).mean(2) for x in (k - k.mean(2, keepdim=True), k)
    )
    return reach.where(reach > 2 * crest, 0.0).amax()


def _is_capturing(k: Tensor) -> bool:
    return k.is_cuda and torch.cuda.is_current_stream_capturing()
