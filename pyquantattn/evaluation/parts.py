"""The resumable parts of a run, as arrays: what one text, or one set of tensors, contributes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from pyquantattn.evaluation.language_model import LanguageModel, LayerTensors
from pyquantattn.evaluation.metrics import TokenMeasurements
from pyquantattn.evaluation.model_level import Storage, decode_greedily, decode_text
from pyquantattn.evaluation.plan import REFERENCE, Settings
from pyquantattn.evaluation.sequence import Calibration, Contestant
from pyquantattn.evaluation.store import Arrays
from pyquantattn.evaluation.tensor_level import InputStatistics, Table, join_tables, measure_layer, with_column

_TOKEN_FIELDS = ("kl", "nll", "reference_nll", "same_top", "right", "reference_right")
_STATISTICS = ("crest", "reach", "channel_mean", "channel_std")


def tensor_part(
    layers: list[LayerTensors],
    contestants: list[Contestant],
    contexts: tuple[int, ...],
    calibrated: list[Calibration] | None,
    advance: Callable[[int], None],
) -> Arrays:
    """Levels 0 and 1 of every layer and contestant."""
    found: dict[str, dict[str, list[Table]]] = {"codec": {}, "attention": {}}
    arrays: Arrays = {}
    for index, layer in enumerate(layers):
        magnitude = None if calibrated is None else calibrated[index]
        measured = measure_layer(layer, contestants, contexts, magnitude, index, len(layers))
        for name, result in measured.items():
            for kind, table in (("codec", result.codec), ("attention", result.attention)):
                found[kind].setdefault(name, []).append(with_column(table, "layer", index))
            arrays[f"nbytes|{index}|{name}"] = np.array(result.nbytes)
        for kv, x in (("k", layer.k), ("v", layer.v)):
            statistics = InputStatistics.of(x)
            arrays |= {f"input|{index}|{kv}|{field}": getattr(statistics, field) for field in _STATISTICS}
        arrays[f"values|{index}"] = np.array(layer.k.numel() + layer.v.numel())
        advance(1)
    for kind, tables in found.items():
        for name, parts in tables.items():
            arrays |= {f"{kind}|{name}|{column}": values for column, values in join_tables(parts).items()}
    return arrays


def table_of(arrays: Arrays, kind: str, contestant: str) -> Table:
    """The columns of one contestant's codec or attention table."""
    prefix = f"{kind}|{contestant}|"
    return {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}


def input_statistics(arrays: Arrays, layer: int, kv: str) -> InputStatistics:
    """What K ("k") or V ("v") of a layer look like."""
    return InputStatistics(*(arrays[f"input|{layer}|{kv}|{field}"] for field in _STATISTICS))


def decode_part(
    model: LanguageModel,
    text: Tensor,
    settings: Settings,
    calibrated: list[Calibration] | None,
    advance: Callable[[int], None],
) -> Arrays:
    """Level 2 of one text."""
    contestants = [*settings.controls(), *settings.under_test(), *settings.ablations()]
    num_uncached = min(settings.num_uncached, len(text) - 1)
    result = decode_text(model, text, settings.reference(), contestants, calibrated, num_uncached, advance)
    arrays: Arrays = {}
    for name, tokens in result.tokens.items():
        arrays |= {f"tokens|{name}|{field}": getattr(tokens, field) for field in _TOKEN_FIELDS}
    for name, storage in result.storage.items():
        arrays[f"storage|{name}"] = np.array([storage.nbytes, storage.num_values, storage.seconds_per_step])
    return arrays


def tokens_of(arrays: Arrays, contestant: str) -> TokenMeasurements:
    """The per-token measurements of one contestant."""
    return TokenMeasurements(*(arrays[f"tokens|{contestant}|{field}"] for field in _TOKEN_FIELDS))


def storage_of(arrays: Arrays, contestant: str) -> Storage:
    """What one contestant's caches took."""
    nbytes, num_values, seconds = arrays[f"storage|{contestant}"]
    return Storage(int(nbytes), int(num_values), float(seconds))


def greedy_part(
    model: LanguageModel,
    text: Tensor,
    settings: Settings,
    calibrated: list[Calibration] | None,
    advance: Callable[[int], None],
) -> Arrays:
    """Greedy continuations of the beginning of one text."""
    prompt = text[: min(settings.greedy_prompt, settings.length)]
    count, reference = settings.greedy_tokens, settings.reference()
    result = decode_greedily(model, prompt, count, reference, settings.under_test(), calibrated, advance)
    arrays: Arrays = {f"greedy|{name}": tokens for name, tokens in result.tokens.items()}
    return arrays | {"greedy|gap": result.top_gap}


def greedy_tokens(arrays: Arrays, contestant: str = REFERENCE) -> np.ndarray:
    """The continuation of one contestant."""
    return arrays[f"greedy|{contestant}"]
