"""The cache that ``model.generate(past_key_values=...)`` takes."""

from dataclasses import replace
from typing import Any

from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from pyquantattn._core import UnsupportedError
from pyquantattn.formats import kv_pair
from pyquantattn.integrations.transformers.key_check import KeyCheck
from pyquantattn.integrations.transformers.layer_formats import (
    GRANULARITIES,
    LayerFormats,
    LayerOffsets,
    LayerScales,
    formats_of_layers,
    offsets_of_layers,
    scales_of_layers,
)
from pyquantattn.integrations.transformers.layers import CodedLayer, GrowingLayer, LayerOptions, StaticLayer
from pyquantattn.integrations.transformers.step_tensors import StepTensors


class QuantizedCache(Cache):
    """A KV cache of a transformers model that stores K and V in KV formats and is read without dequantising.

    Load the model with ``attn_implementation="pyquantattn"`` and pass a new cache to ``generate``. Sliding-window
    layers hold their window only. Layers that have no attention (or an unusual cache) keep the model's own.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
    ...                      num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=None)
    >>> model = LlamaForCausalLM(config).eval()
    >>> model.set_attn_implementation("pyquantattn")
    >>> cache = QuantizedCache(model.config, kv_format="int8")
    >>> tokens = model.generate(torch.tensor([[1, 2, 3]]), past_key_values=cache, max_new_tokens=4, do_sample=False)
    >>> tokens.shape, cache.get_seq_length()
    (torch.Size([1, 7]), 6)
    """

    layers: list[CacheLayerMixin]

    def __init__(
        self,
        config: Any,
        kv_format: LayerFormats = "int8",
        *,
        prefill: str = "exact",
        max_cache_len: int | None = None,
        scale_granularity: str = "token",
        k_scale: LayerScales = None,
        v_scale: LayerScales = None,
        k_offset: LayerOffsets = None,
        max_step_tokens: int = 64,
    ) -> None:
        """Makes an empty cache; memory is allocated when the first tokens arrive.

        Args:
            config: of the model; a composite one may hold the text model's.
            kv_format: a format (``"int8"``), a pair (``"fp16/int8"``), one name for each layer, or a rule
                ``(layer_idx, num_layers) -> name`` such as ``keep_edges("int8", first=1, last=1)``.
            prefill: what the prompt's own attention reads: ``"exact"`` its fresh K and V, ``"cached"`` the quantised
                ones, as a serving engine does that fills the cache first.
            max_cache_len: tokens that are allocated at once, for compiled decoding; None: the cache grows.
            scale_granularity: what one scale covers: ``"token"`` one token of one head (dynamic), ``"head"`` or
                ``"tensor"`` of a layer (static; taken from the first tokens where no scale is given, later ones
                saturate).
            k_scale, v_scale: static scales, a number or float32 ``[]`` or ``[H]``, or a list of one for each layer.
            k_offset: taken out of the keys before they are encoded and counted back in exactly: float32 ``[H, D]``, or
                ``"prompt"`` for the mean key of the first tokens (of fewer than 32: nothing), or a list of one or None
                for each layer; None: nothing. For models whose keys carry a large bias, such as Qwen2.5.
            max_step_tokens: with ``max_cache_len``, most tokens of a step after the first over a sliding layer.

        Raises:
            ValueError: an argument breaks one of these rules.
            UnsupportedError: no layer of the model has a cache of K and V alone.
        """
        _check(prefill, scale_granularity, max_cache_len, max_step_tokens, k_scale, v_scale)
        stock = DynamicCache(config=config).layers
        if not any(map(_is_replaced, stock)):
            model_type = getattr(config, "model_type", type(config).__name__)
            raise UnsupportedError(
                f"QuantizedCache: the model must have a layer that keeps K and V alone, got none in {model_type}"
            )
        names = formats_of_layers(kv_format, len(stock))
        scales = zip(
            scales_of_layers(k_scale, len(stock), "k_scale"), scales_of_layers(v_scale, len(stock), "v_scale"),
            strict=True,
        )  # fmt: skip
        offsets = offsets_of_layers(k_offset, len(stock))
        options = [
            LayerOptions(f"layer {index}", name, _window(layer), scale_granularity, *pair, offset, prefill == "exact")
            for index, (layer, name, pair, offset) in enumerate(zip(stock, names, scales, offsets, strict=True))
        ]
        options = _with_key_check(options, stock)
        if max_cache_len is None:
            steps = StepTensors()
            coded: list[CodedLayer] = [GrowingLayer(option, steps) for option in options]
        else:
            coded = [StaticLayer(option, max_cache_len, max_step_tokens) for option in options]
            stock_of_size = StaticCache(config=config, max_cache_len=max_cache_len).layers
        other = stock if max_cache_len is None else stock_of_size
        super().__init__(
            layers=[
                ours if _is_replaced(layer) else theirs for layer, ours, theirs in zip(stock, coded, other, strict=True)
            ]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all codes, scales and offsets, room that is not used yet included."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, CodedLayer))

    @property
    def nbytes_in_use(self) -> int:
        """Bytes of codes, scales and offsets of the tokens that are held; of a cache of fixed size, all of them."""
        return sum(layer.nbytes_in_use for layer in self.layers if isinstance(layer, (GrowingLayer, StaticLayer)))

    @property
    def kv_formats(self) -> list[str | None]:
        """The format of each layer; None for a layer that keeps the model's own cache."""
        return [layer.options.kv_format if isinstance(layer, CodedLayer) else None for layer in self.layers]


def _with_key_check(options: list[LayerOptions], stock: list[CacheLayerMixin]) -> list[LayerOptions]:
    """One look at the keys of all layers that store them in 8 bits as they come."""
    is_fragile = [
        _is_replaced(layer) and option.k_offset is None and kv_pair(option.kv_format, "QuantizedCache").k.has_scale
        for option, layer in zip(options, stock, strict=True)
    ]
    check = KeyCheck(sum(is_fragile))
    return [
        replace(option, key_check=check) if chosen else option
        for option, chosen in zip(options, is_fragile, strict=True)
    ]


def _is_replaced(layer: CacheLayerMixin) -> bool:
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def _window(layer: CacheLayerMixin) -> int:
    return int(layer.sliding_window) if isinstance(layer, DynamicSlidingWindowLayer) else 0


def _check(
    prefill: str, granularity: str, max_cache_len: int | None, max_step_tokens: int, k_scale: LayerScales,
    v_scale: LayerScales,
) -> None:  # fmt: skip
    if prefill not in ("exact", "cached"):
        raise ValueError(f'QuantizedCache: prefill must be "exact" or "cached", got {prefill!r}')
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"QuantizedCache: scale_granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}"
        )
    for name, size in (("max_cache_len", max_cache_len), ("max_step_tokens", max_step_tokens)):
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"QuantizedCache: {name} must be an int of at least 1, got {size!r}")
    if granularity == "token" and (k_scale is not None or v_scale is not None):
        raise ValueError(
            'QuantizedCache: scale_granularity must be "head" or "tensor" where scales are given, got "token"'
        )
