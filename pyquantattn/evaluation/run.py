"""Runs the parts of an evaluation over a model's texts, or over given tensors."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pyquantattn.evaluation.language_model import LanguageModel, LayerTensors, capture
from pyquantattn.evaluation.needles import KEY_DIGITS, NEEDLE_DEPTHS, Encode, hide, needle_contestants, needle_part
from pyquantattn.evaluation.parts import decode_part, greedy_part, tensor_part
from pyquantattn.evaluation.plan import Settings
from pyquantattn.evaluation.record import software
from pyquantattn.evaluation.sequence import Calibration
from pyquantattn.evaluation.store import Arrays, PartStore

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Text:
    """Token ids [n] of one passage."""

    name: str
    tokens: Tensor

    @property
    def sha256(self) -> str:
        """Of the token ids, as little-endian int64."""
        return hashlib.sha256(self.tokens.cpu().long().numpy().astype("<i8").tobytes()).hexdigest()


class Progress(Protocol):
    """Shows how far a stage is."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Within the context, the yielded function is called with work done; the total is `total`."""


@dataclass(frozen=True)
class Stage:
    """Resumable parts of one kind."""

    name: str  # of its files
    title: str
    count: int  # parts
    work: int  # of a part, as the progress counts it
    make: Callable[[int, Advance], Arrays]  # the part of an index


@dataclass(frozen=True)
class RawResults:
    """The arrays of every part."""

    tensors: list[Arrays]
    decoded: list[Arrays]
    greedy: list[Arrays]
    layer_labels: list[str]
    needles: list[Arrays] = field(default_factory=list)
    num_reused: int = 0  # parts that an interrupted run had finished


def run_model(
    model: LanguageModel,
    texts: list[Text],
    calibration: Text | None,
    settings: Settings,
    folder: Path,
    progress: Progress,
    encode: Encode,
) -> RawResults:
    """All levels on a model. Each text [settings.length + 1]; `encode` is the model's tokenizer."""
    description = {
        "model": model.identity,
        "texts": [text.sha256 for text in texts],
        "calibration": calibration.sha256 if calibration else None,
        "settings": settings.to_json(),
        "software": software(),
    }
    store = PartStore(folder, description)
    if settings.num_needles:  # so that contexts that are too short are refused before hours have passed
        hide(texts[0].tokens, settings.contexts[0], 0.0, "0" * KEY_DIGITS, encode)
    with torch.inference_mode():
        calibrated = _calibrate(model, calibration, settings, progress)
        stages = _model_stages(model, texts, calibrated, settings, encode)
        parts = {stage.name: _parts(store, progress, stage) for stage in stages if stage.count}
    labels = [str(layer) for layer in range(model.num_layers)]
    return RawResults(
        parts["tensors"],
        parts["decode"],
        parts.get("greedy", []),
        labels,
        parts.get("needles", []),
        store.num_found,
    )


def _calibrate(
    model: LanguageModel, text: Text | None, settings: Settings, progress: Progress
) -> list[Calibration] | None:
    if not settings.needs_calibration or text is None:
        return None
    with progress.stage("calibrating scales and offsets", 1) as advance:
        found = [Calibration(layer.k, layer.v) for layer in capture(model, text.tokens[: settings.length])]
        advance(1)
    return found


def _parts(store: PartStore, progress: Progress, stage: Stage) -> list[Arrays]:
    found = []
    with progress.stage(stage.title, stage.count * stage.work) as advance:
        for index in range(stage.count):
            part, was_there = store.load_or_make(f"{stage.name}-{index}", functools.partial(stage.make, index, advance))
            advance(stage.work if was_there else 0)
            found.append(part)
    return found


def _model_stages(
    model: LanguageModel,
    texts: list[Text],
    calibrated: list[Calibration] | None,
    settings: Settings,
    encode: Encode,
) -> list[Stage]:
    def tensors(index: int, advance: Advance) -> Arrays:
        layers = capture(model, texts[index].tokens[: settings.length])
        return tensor_part(layers, settings.all_contestants(), settings.contexts, calibrated, advance)

    def decoded(index: int, advance: Advance) -> Arrays:
        return decode_part(model, texts[index].tokens, settings, calibrated, advance)

    def greedy(index: int, advance: Advance) -> Arrays:
        return greedy_part(model, texts[index].tokens, settings, calibrated, advance)

    def needles(index: int, advance: Advance) -> Arrays:
        text = texts[index % len(texts)].tokens
        return needle_part(model, text, index, settings, calibrated, encode, advance)

    num_attention = min(settings.num_attention_texts, len(texts))
    num_greedy = len(texts) if settings.greedy_tokens else 0
    greedy_work = settings.greedy_tokens * (1 + len(settings.under_test()))
    needle_work = len(settings.contexts) * len(NEEDLE_DEPTHS) * len(needle_contestants(settings))
    return [
        Stage("tensors", "codec and attention", num_attention, model.num_layers, tensors),
        Stage("decode", "teacher-forced decode", len(texts), settings.length, decoded),
        Stage("greedy", "greedy decode", num_greedy, greedy_work, greedy),
        Stage("needles", "pass keys", settings.num_needles, needle_work, needles),
    ]


def run_tensors(
    layers: list[LayerTensors],
    calibration: list[LayerTensors],
    settings: Settings,
    folder: Path,
    progress: Progress,
) -> RawResults:
    """Levels 0 and 1 on given tensors; static scales and key offsets come from `calibration`, layer by layer."""
    tensors = [layer.description() for layer in (*layers, *calibration)]
    description = {"tensors": tensors, "settings": settings.to_json(), "software": software()}
    store = PartStore(folder, description)
    contestants = settings.all_contestants()
    with torch.inference_mode(), progress.stage("codec and attention", len(layers)) as advance:
        calibrated = [Calibration(layer.k, layer.v) for layer in calibration]

        def make() -> Arrays:
            return tensor_part(layers, contestants, settings.contexts, calibrated, advance)

        part, was_there = store.load_or_make("tensors-0", make)
        advance(len(layers) if was_there else 0)
    return RawResults([part], [], [], [layer.label for layer in layers], num_reused=store.num_found)
