"""Runs the parts of an evaluation over a model's texts, or over given tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pyquantattn.evaluation.language_model import LanguageModel, LayerTensors, capture
from pyquantattn.evaluation.parts import decode_part, greedy_part, tensor_part
from pyquantattn.evaluation.plan import Settings
from pyquantattn.evaluation.record import software
from pyquantattn.evaluation.sequence import Calibration
from pyquantattn.evaluation.store import Arrays, PartStore


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

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Within the context, the yielded function is called with work done; the total is `total`."""


@dataclass(frozen=True)
class RawResults:
    """The arrays of every part."""

    tensors: list[Arrays]
    decoded: list[Arrays]
    greedy: list[Arrays]
    layer_labels: list[str]
    num_reused: int = 0  # parts that an interrupted run had finished


def run_model(
    model: LanguageModel,
    texts: list[Text],
    calibration: Text | None,
    settings: Settings,
    folder: Path,
    progress: Progress,
) -> RawResults:
    """All levels on a model. Each text [settings.length + 1]."""
    description = {
        "model": model.identity,
        "texts": [text.sha256 for text in texts],
        "calibration": calibration.sha256 if calibration else None,
        "settings": settings.to_json(),
        "software": software(),
    }
    store = PartStore(folder, description)
    with torch.inference_mode():
        calibrated = _calibrate(model, calibration, settings, progress)
        return RawResults(
            _tensor_parts(model, texts, calibrated, settings, store, progress),
            _decode_parts(model, texts, calibrated, settings, store, progress),
            _greedy_parts(model, texts, calibrated, settings, store, progress),
            [str(layer) for layer in range(model.num_layers)],
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


def _tensor_parts(
    model: LanguageModel,
    texts: list[Text],
    calibrated: list[Calibration] | None,
    settings: Settings,
    store: PartStore,
    progress: Progress,
) -> list[Arrays]:
    chosen = texts[: settings.num_attention_texts]
    contestants = settings.all_contestants()
    parts = []
    with progress.stage("codec and attention", len(chosen) * model.num_layers) as advance:
        for index, text in enumerate(chosen):

            def make(text: Text = text) -> Arrays:
                layers = capture(model, text.tokens[: settings.length])
                return tensor_part(layers, contestants, settings.contexts, calibrated, advance)

            part, was_there = store.load_or_make(f"tensors-{index}", make)
            advance(model.num_layers if was_there else 0)
            parts.append(part)
    return parts


def _decode_parts(
    model: LanguageModel,
    texts: list[Text],
    calibrated: list[Calibration] | None,
    settings: Settings,
    store: PartStore,
    progress: Progress,
) -> list[Arrays]:
    parts = []
    with progress.stage("teacher-forced decode", len(texts) * settings.length) as advance:
        for index, text in enumerate(texts):

            def make(text: Text = text) -> Arrays:
                return decode_part(model, text.tokens, settings, calibrated, advance)

            part, was_there = store.load_or_make(f"decode-{index}", make)
            advance(settings.length if was_there else 0)
            parts.append(part)
    return parts


def _greedy_parts(
    model: LanguageModel,
    texts: list[Text],
    calibrated: list[Calibration] | None,
    settings: Settings,
    store: PartStore,
    progress: Progress,
) -> list[Arrays]:
    if settings.greedy_tokens == 0:
        return []
    work = settings.greedy_tokens * (1 + len(settings.under_test()))
    parts = []
    with progress.stage("greedy decode", len(texts) * work) as advance:
        for index, text in enumerate(texts):

            def make(text: Text = text) -> Arrays:
                return greedy_part(model, text.tokens, settings, calibrated, advance)

            part, was_there = store.load_or_make(f"greedy-{index}", make)
            advance(work if was_there else 0)
            parts.append(part)
    return parts


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
    return RawResults([part], [], [], [layer.label for layer in layers], store.num_found)
