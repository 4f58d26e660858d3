"""Who decodes: a cache, the attention that reads it, and how a step is launched."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .results import OURS

EAGER, GRAPH = "", " (graph)"
REFERENCE = "DynamicCache, SDPA"
MASKLESS = "one_token"  # a single new token needs no mask, but while a graph is captured transformers makes one
NOISE = "DynamicCache, eager attention"  # the reference's numbers in another order of summation
FORMATS = {"cuda": "int8,fp8_e4m3,bf16", "cpu": "int8,fp8_e4m3,fp16"}
PEERS = ("dynamic", "dynamic flash", "dynamic graph", "static", "fp8", "hqq", "quanto")
_PACKAGES = {"hqq": "hqq.core.quantize", "quanto": "optimum.quanto"}


@dataclass(frozen=True)
class Contender:
    """`make_cache(config, length)` makes an empty cache that `length` tokens will fit in."""

    name: str
    attention: str  # transformers' name of the implementation
    make_cache: Callable[[Any, int], Any]
    is_graph: bool = False  # a step is one CUDA graph, so its host time does not count
    has_cudnn: bool = True  # whether torch may choose cuDNN's kernels, which it plans anew for every length

    @property
    def plans_each_length(self) -> bool:
        """Whether a step costs more at a length that this process has not seen, as those of a real text are."""
        return not self.is_graph and self.attention == "sdpa"


def ours(kv_format: str, *, is_graph: bool) -> Contender:
    from pyquantattn.integrations.transformers import QuantizedCache

    def make_cache(config: Any, length: int) -> Any:
        return QuantizedCache(config, kv_format, max_cache_len=length if is_graph else None)

    return Contender(f"{OURS}{kv_format}{GRAPH if is_graph else EAGER}", "pyquantattn", make_cache, is_graph)


def _dynamic(config: Any, _length: int) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=config)


def _static(config: Any, length: int) -> Any:
    from transformers import StaticCache

    return StaticCache(config=config, max_cache_len=length)


def _quantized(**options: Any) -> Callable[[Any, int], Any]:
    """transformers' own quantised cache, which dequantises everything at every step."""

    def make_cache(config: Any, _length: int) -> Any:
        from transformers import QuantizedCache

        return QuantizedCache(config=config, **options)

    return make_cache


_ALL = {
    "dynamic": Contender(REFERENCE, "sdpa", _dynamic),
    "dynamic flash": Contender("DynamicCache, SDPA without cuDNN", "sdpa", _dynamic, has_cudnn=False),
    # A graph of one length, that of the captured step: what the device needs, and no loop that anybody could run.
    "dynamic graph": Contender(REFERENCE + GRAPH, MASKLESS, _dynamic, is_graph=True),
    "static": Contender("StaticCache, SDPA" + GRAPH, "sdpa", _static, is_graph=True),
    "fp8": Contender("transformers FP8", "sdpa", _quantized(backend="fp8")),
    "hqq": Contender("transformers HQQ int8", "sdpa", _quantized(backend="hqq", nbits=8, axis_key=1, axis_value=1)),
    "quanto": Contender("transformers quanto int4", "sdpa", _quantized(backend="quanto", nbits=4)),
}


def noise_contender() -> Contender:
    return Contender(NOISE, "eager", _dynamic)


def contenders(formats: list[str], peers: list[str], *, has_graphs: bool) -> list[Contender]:
    """Everyone, the reference first: the others' logits are compared with its."""
    found = [_ALL["dynamic"]]
    found += [ours(name, is_graph=is_graph) for is_graph in (False, True)[: 1 + has_graphs] for name in formats]
    found += [_ALL[name] for name in peers if name != "dynamic" and (has_graphs or not _ALL[name].is_graph)]
    return found


def missing(peers: list[str]) -> dict[str, str]:
    """Chosen peers that cannot run here, and why."""
    from transformers import QuantizedCache

    reasons = {}
    if "fp8" in peers and "fp8" not in inspect.getsource(QuantizedCache.__init__):
        reasons["fp8"] = "this transformers has no FP8 backend of its quantised cache (5.23 has)"
    for name, module in _PACKAGES.items():
        if name in peers:
            try:
                __import__(module)
            except Exception as error:
                reasons[name] = f"{module} cannot be imported: {error}"
    return reasons


def register_maskless() -> None:
    """Makes transformers know MASKLESS."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(MASKLESS, sdpa_attention_forward)
    AttentionMaskInterface.register(MASKLESS, lambda *_, **__: None)


def fill(cache: Any, layers: Any) -> None:
    """Puts K and V of a context into every layer."""
    for index, (k, v) in enumerate(layers):
        cache.update(k, v, index)
