"""Names of cache specifications: a format, how its scales are made, and rules for single layers.

``int8``                    dynamic scales, one for each token and KV head
``int8@head``               one static scale for each KV head, from calibration text
``fp8_e4m3@tensor``         one static scale for each layer
``fp8_e5m2@unit``           scale 1.0, what engines do that never calibrate
``fp16/int8``               a pair: K in fp16, V in int8
``int8:centred``            keys without the mean key of the calibration text, which attention counts back in
``int8@head:256``           calibrated on the first 256 tokens of that text (``int8:centred:256`` likewise)
``int8+0=fp16+-2..-1=fp16`` int8, but the first and the last two layers in fp16
"""

from __future__ import annotations

from dataclasses import dataclass

from pyquantattn.formats import KvPair, kv_pair

GRANULARITIES = ("token", "head", "tensor", "unit")
CENTRED = "centred"


@dataclass(frozen=True)
class LayerSpec:
    """How one layer stores K and V."""

    kv_format: str
    granularity: str = "token"
    is_centred: bool = False
    calibration_tokens: int | None = None  # None: the whole text

    @property
    def pair(self) -> KvPair:
        """The formats of K and V."""
        return kv_pair(self.kv_format, "evaluate")

    @property
    def needs_calibration(self) -> bool:
        """Whether scales or key offset must be known before the text starts."""
        return self.granularity in ("head", "tensor") or self.is_centred


@dataclass(frozen=True)
class CacheSpec:
    """A named choice of storage for every layer.

    >>> spec = CacheSpec.parse("int8+0=fp16")
    >>> spec.layer(0, 6).kv_format, spec.layer(5, 6).kv_format
    ('fp16', 'int8')
    """

    name: str
    default: LayerSpec
    rules: tuple[tuple[int, int, LayerSpec], ...] = ()  # first layer, last layer (negative: from the end), storage

    @classmethod
    def parse(cls, name: str) -> CacheSpec:
        """Reads a name.

        Raises:
            ValueError: an unknown format, granularity or layer range.
        """
        default, *rules = name.split("+")
        return cls(name, _layer_spec(default), tuple(_rule(rule, name) for rule in rules))

    def layer(self, index: int, num_layers: int) -> LayerSpec:
        """Storage of layer `index`; the last rule that names it wins."""
        chosen = self.default
        for first, last, storage in self.rules:
            if first % num_layers <= index <= last % num_layers:
                chosen = storage
        return chosen

    def require_layers(self, num_layers: int) -> None:
        """Raises ValueError where a rule names layers that a model of `num_layers` does not have."""
        for first, last, _ in self.rules:
            is_there = all(-num_layers <= layer < num_layers for layer in (first, last))
            if not is_there or first % num_layers > last % num_layers:
                raise ValueError(
                    f"evaluate: rules must name layers from 0 to {num_layers - 1}, or from -{num_layers} to -1 (the "
                    f"last), the lower one first, got {first} to {last} in {self.name!r}"
                )

    @property
    def needs_calibration(self) -> bool:
        """Whether some layer must be calibrated."""
        return any(storage.needs_calibration for storage in (self.default, *(storage for _, _, storage in self.rules)))


def _layer_spec(text: str) -> LayerSpec:
    name, *options = text.split(":")
    sizes = [option for option in options if option != CENTRED]
    if len(sizes) > 1 or len(set(options)) != len(options) or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"evaluate: what follows a colon must be {CENTRED} or a number of tokens, got {text!r}")
    kv_format, at, granularity = name.partition("@")
    size = int(sizes[0]) if sizes else None
    found = LayerSpec(kv_format, granularity if at else "token", CENTRED in options, size)
    if found.granularity not in GRANULARITIES:
        raise ValueError(f"evaluate: granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    if not (found.pair.k.has_scale or found.pair.v.has_scale) and at:
        raise ValueError(f"evaluate: a format without scales takes no granularity, got {text!r}")
    if sizes and not found.needs_calibration:
        raise ValueError(f"evaluate: a format that is not calibrated takes no number of tokens, got {text!r}")
    return found


def _rule(text: str, name: str) -> tuple[int, int, LayerSpec]:
    layers, equals, storage = text.partition("=")
    first, dots, last = layers.partition("..")
    try:
        bounds = int(first), int(last if dots else first)
    except ValueError:
        bounds = None
    if bounds is None or not equals:
        raise ValueError(f"evaluate: a layer rule must look like 0=fp16 or -2..-1=fp16, got {text!r} in {name!r}")
    return (*bounds, _layer_spec(storage))
