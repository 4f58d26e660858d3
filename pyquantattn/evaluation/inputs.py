"""From a command line to raw results: the model and its texts, given tensors, or synthetic ones."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from pyquantattn.devices import as_device
from pyquantattn.evaluation.dumps import load_dump
from pyquantattn.evaluation.exact import AttentionOptions
from pyquantattn.evaluation.huggingface import HuggingFaceModel
from pyquantattn.evaluation.language_model import LanguageModel, LayerTensors
from pyquantattn.evaluation.plan import EIGHT_BITS, MIN_CONTEXT, Settings, default_reference
from pyquantattn.evaluation.profiles import PROFILES, make_profile
from pyquantattn.evaluation.run import Progress, RawResults, Text, run_model, run_tensors
from pyquantattn.evaluation.shifted_keys import ShiftedKeys
from pyquantattn.evaluation.spec import CacheSpec
from pyquantattn.runtime import available_backends

Json = dict[str, Any]
PROFILE_LENGTH = 4096
PROFILE_SEED, CALIBRATION_TEXT = 0, 1  # profiles are calibrated on another text


class TokenizingModel(LanguageModel, Protocol):
    """A model with its tokenizer."""

    def tokenize(self, text: str) -> Tensor:
        """Token ids [n], without special ones."""


class ModelWithTexts(TokenizingModel, Protocol):
    """A model that brings its own held-out text."""

    def texts(self, count: int, length: int) -> list[Text]:
        """`count` passages of `length` tokens."""


BuiltIn = Callable[[str], ModelWithTexts]  # device -> model
MakeTexts = Callable[[int, int], list[Text]]  # count, length -> passages


@dataclass(frozen=True)
class Run:
    """What was done, to what, and what came out."""

    settings: Settings
    raw: RawResults
    inputs: Json  # for the record


def run(arguments: argparse.Namespace, built_in: BuiltIn | None, progress: Progress) -> Run:
    """Does what a parsed command line asks for.

    Raises:
        ValueError: a bad argument, or an input that does not serve.
    """
    _require_device(arguments.device)
    if arguments.profiles is not None:
        return _run_profiles(arguments, progress)
    if arguments.tensors is not None:
        return _run_dump(arguments, progress)
    # What needs no model is refused before one is loaded.
    _settings(arguments, Settings().contexts, Settings().reference_format, 0)
    if arguments.model is not None:
        contents = {path: _read_text(path) for path in arguments.text}
        model = HuggingFaceModel(arguments.model, arguments.device, arguments.dtype)
        return _run_model(arguments, model, lambda count, length: split_texts(contents, model, count, length), progress)
    if built_in is None:
        raise ValueError(
            "evaluate: --model, --tensors or --profiles must be given, got none; the built-in model belongs to "
            "tools/evaluate.py of the source tree"
        )
    small = built_in(arguments.device)
    return _run_model(arguments, small, small.texts, progress)


def _require_device(name: str) -> None:
    backends = available_backends()
    if as_device(name, "evaluate").type not in backends:
        raise ValueError(
            f"evaluate: --device must be one that this build and machine can run ({', '.join(backends)}), got {name}"
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"evaluate: --text must be UTF-8, got {path}: {error}") from error


def _settings(arguments: argparse.Namespace, contexts: tuple[int, ...], reference: str, num_layers: int) -> Settings:
    """`num_layers` 0: not known yet."""
    reference = arguments.reference or reference
    formats = arguments.formats or (reference, *EIGHT_BITS)
    lone = arguments.each_layer
    lone_layers = (f"{reference}+{layer}={lone}" for layer in range(num_layers if lone is not None else 0))
    settings = Settings(
        formats=(*formats, *lone_layers),
        contexts=tuple(arguments.contexts) if arguments.contexts else contexts,
        num_texts=arguments.texts,
        num_attention_texts=arguments.attention_texts,
        num_uncached=arguments.uncached,
        greedy_prompt=arguments.greedy_prompt,
        greedy_tokens=arguments.greedy_tokens,
        num_needles=arguments.needles,
        has_ablations=not arguments.no_ablations,
        reference_format=reference,
    )
    for name in settings.formats if num_layers else ():
        CacheSpec.parse(name).require_layers(num_layers)
    return settings


def _run_model(arguments: argparse.Namespace, model: TokenizingModel, make_texts: MakeTexts, progress: Progress) -> Run:
    fitting = tuple(context for context in Settings().contexts if context < model.max_length)
    settings = _settings(
        arguments, fitting or (model.max_length - 1,), default_reference(model.dtype), model.num_layers
    )
    if settings.length >= model.max_length:
        raise ValueError(
            f"evaluate: contexts must end below the model's {model.max_length} positions, got {settings.length}"
        )
    measured = model if arguments.shift_keys is None else ShiftedKeys(model, arguments.shift_keys)
    texts = make_texts(settings.num_texts + settings.needs_calibration, settings.length + 1)
    calibration = texts.pop() if settings.needs_calibration else None
    raw = run_model(measured, texts, calibration, settings, arguments.out, progress, model.tokenize)
    amount = f"{len(texts)} {'text' if len(texts) == 1 else 'texts'}, {len(texts) * settings.length:,} tokens"
    inputs = {
        "name": measured.name,
        "description": f"{amount}, each predicted from K and V read from the cache.",
        "model": measured.identity,
        "texts": [{"name": text.name, "tokens": len(text.tokens), "sha256": text.sha256} for text in texts],
        "calibration": {"name": calibration.name, "sha256": calibration.sha256} if calibration else None,
    }
    return Run(settings, raw, inputs)


def split_texts(contents: dict[Path, str], model: HuggingFaceModel, count: int, length: int) -> list[Text]:
    """Consecutive passages of files, in order, each behind what the tokenizer puts first.

    Raises:
        ValueError: the files are too short.
    """
    found = []
    for path, content in contents.items():
        tokens, step = model.tokenize(content), length - len(model.first_tokens)
        for first in range(0, len(tokens) - step + 1, step):
            found.append(Text(f"{path.name}:{first}", model.with_first_tokens(tokens[first : first + step])))
    if len(found) < count:
        raise ValueError(
            f"evaluate: --text must hold {count} passages of {length} tokens, got {len(found)}; give more text, fewer "
            "--texts or shorter --contexts"
        )
    return found[:count]


def _run_profiles(arguments: argparse.Namespace, progress: Progress) -> Run:
    names = arguments.profiles or PROFILES
    length = arguments.contexts[-1] if arguments.contexts else PROFILE_LENGTH
    layers, calibration = (
        [make_profile(name, length, PROFILE_SEED, text) for name in names] for text in (0, CALIBRATION_TEXT)
    )
    inputs = {
        "name": "synthetic profiles",
        "description": f"Synthetic q, K and V, {length:,} keys each; no model. The worst profile decides a verdict.",
        "profiles": list(names),
        "seed": PROFILE_SEED,
        "calibration_text": CALIBRATION_TEXT,
    }
    return _run_tensors(arguments, layers, calibration, inputs, progress)


def _run_dump(arguments: argparse.Namespace, progress: Progress) -> Run:
    layers = load_dump(arguments.tensors)
    inputs = {
        "name": arguments.tensors.name,
        "description": f"Given q, K and V of {len(layers)} layers; no model. Calibrated on themselves where need be.",
    }
    return _run_tensors(arguments, layers, layers, inputs, progress)


def _run_tensors(
    arguments: argparse.Namespace,
    layers: list[LayerTensors],
    calibration: list[LayerTensors],
    inputs: Json,
    progress: Progress,
) -> Run:
    longest = max(layer.length for layer in layers)
    if longest < MIN_CONTEXT:
        raise ValueError(f"evaluate: k and v must hold at least {MIN_CONTEXT} tokens, got {longest}")
    settings = _settings(arguments, (longest,), default_reference(layers[0].k.dtype), len(layers))
    layers, calibration = ([_on_device(layer, arguments.device) for layer in group] for group in (layers, calibration))
    inputs["layers"] = [layer.description() for layer in layers]
    return Run(settings, run_tensors(layers, calibration, settings, arguments.out, progress), inputs)


def _on_device(layer: LayerTensors, device: str) -> LayerTensors:
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in layer.options.items()}
    q, k, v = (x.to(device) for x in (layer.q, layer.k, layer.v))
    return LayerTensors(layer.label, q, k, v, cast(AttentionOptions, moved))
