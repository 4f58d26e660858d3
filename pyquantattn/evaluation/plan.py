"""What a run does: settings, and the contestants that follow from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from pyquantattn.evaluation.sequence import Contestant
from pyquantattn.evaluation.spec import CacheSpec

REFERENCE, REPEAT, NOISE, WRONG_SCALE = "reference", "reference again", "noise floor", "wrong scale"
EIGHT_BITS = ("int8", "fp8_e4m3", "fp8_e5m2")
SIXTEEN_BITS = ("fp16", "bf16")
WRONG_SCALE_FACTOR = 4.0
NOISE_SPLITS, NOISE_BLOCK = 3, 7  # another order of summation in our kernel and in the model's matrix products
MIN_CONTEXT = 16


@dataclass(frozen=True)
class Settings:
    """Everything but the inputs that decides the figures."""

    formats: tuple[str, ...] = ("fp16", *EIGHT_BITS)
    contexts: tuple[int, ...] = (256, 512, 1024, 2048)
    num_texts: int = 8
    num_attention_texts: int = 2  # texts whose attention outputs are measured too
    num_uncached: int = 512  # tokens of each text compared with the model's own attention
    greedy_prompt: int = 256
    greedy_tokens: int = 128
    num_needles: int = 0  # pass keys hidden at each depth of each context
    has_ablations: bool = True
    reference_format: str = "fp16"

    def __post_init__(self) -> None:
        for name in self.formats:
            CacheSpec.parse(name)
        if self.reference_format not in SIXTEEN_BITS:
            raise ValueError(
                f"evaluate: reference must be one of {', '.join(SIXTEEN_BITS)}, got {self.reference_format!r}"
            )
        if list(self.contexts) != sorted(set(self.contexts)) or not self.contexts or self.contexts[0] < MIN_CONTEXT:
            raise ValueError(f"evaluate: contexts must increase from at least {MIN_CONTEXT}, got {self.contexts}")
        if len(set(self.formats)) != len(self.formats) or not self.formats:
            raise ValueError(f"evaluate: formats must be distinct and at least one, got {self.formats}")
        for name in ("num_texts", "num_attention_texts", "num_uncached", "greedy_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluate: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("greedy_tokens", "num_needles"):
            if getattr(self, name) < 0:
                raise ValueError(f"evaluate: {name} must be at least 0, got {getattr(self, name)}")

    @property
    def length(self) -> int:
        """Tokens of a text that are decoded."""
        return self.contexts[-1]

    def to_json(self) -> dict[str, object]:
        """For the record."""
        return dataclasses.asdict(self)

    def reference(self) -> Contestant:
        """What everyone is measured against: the 16-bit cache on the same path."""
        return Contestant(REFERENCE, CacheSpec.parse(self.reference_format))

    def controls(self) -> list[Contestant]:
        """The reference again, the reference in another order of summation, and int8 with wrong scales."""
        sixteen_bits = CacheSpec.parse(self.reference_format)
        return [
            Contestant(REPEAT, sixteen_bits),
            Contestant(NOISE, sixteen_bits, num_splits=NOISE_SPLITS, query_block=NOISE_BLOCK),
            Contestant(WRONG_SCALE, CacheSpec.parse("int8"), scale_factor=WRONG_SCALE_FACTOR),
        ]

    def under_test(self) -> list[Contestant]:
        """The formats, in the order given, but for the reference's own: its row is the noise floor's."""
        return [Contestant(name, CacheSpec.parse(name)) for name in self.formats if name != self.reference_format]

    def contestant_name(self, kv_format: str) -> str:
        """The contestant whose measurements are a format's."""
        return NOISE if kv_format == self.reference_format else kv_format

    def ablations(self) -> list[Contestant]:
        """K alone and V alone, where something is quantised."""
        if not self.has_ablations:
            return []
        return [
            Contestant(ablation_name(contestant.name, only), contestant.spec, only=only)
            for contestant in self.under_test()
            for only in ("K", "V")
            if (contestant.spec.default.pair.k if only == "K" else contestant.spec.default.pair.v).has_scale
        ]

    def all_contestants(self) -> list[Contestant]:
        """Everyone, the reference first."""
        return [self.reference(), *self.controls(), *self.under_test(), *self.ablations()]

    @property
    def needs_calibration(self) -> bool:
        """Whether some format's scales come from calibration text."""
        return any(CacheSpec.parse(name).needs_calibration for name in self.formats)


def ablation_name(name: str, only: str) -> str:
    """Name of the contestant that quantises K or V alone."""
    return f"{name}, {only} only"


def default_reference(dtype: torch.dtype) -> str:
    """The 16-bit format that loses nothing of a bfloat16 model, and least of any other."""
    return "bf16" if dtype == torch.bfloat16 else "fp16"
