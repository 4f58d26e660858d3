"""Level 2: a text is decoded through every contestant's caches, in step, against the same reference.

The text's tokens are fed in blocks (teacher forcing). A block's K and V are encoded first and its queries then read the
cache, so every prediction rests on quantised history alone and errors accumulate as they do in use. Running all
contestants in step means that no logits have to be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyquantattn.evaluation.language_model import LanguageModel
from pyquantattn.evaluation.metrics import TokenMeasurements, measure_tokens
from pyquantattn.evaluation.sequence import MAX_QUERY_TOKENS, Calibration, Contestant, QuantizedSequence

TIMING_ROUNDS = 9
UNCACHED = "no cache"


@dataclass(frozen=True)
class Storage:
    """What the caches of one contestant took at the end of a text."""

    nbytes: int
    num_values: int
    seconds_per_step: float  # decode_attention of all layers, one new token


@dataclass(frozen=True)
class TextResult:
    """One text through every contestant."""

    tokens: dict[str, TokenMeasurements]
    storage: dict[str, Storage]


def decode_text(
    model: LanguageModel,
    text: Tensor,
    reference: Contestant,
    contestants: list[Contestant],
    calibrated: list[Calibration] | None,
    num_uncached: int,
    advance: Callable[[int], None],
) -> TextResult:
    """Decodes text [n + 1]; n predictions of each contestant.

    The model's own attention over the first `num_uncached` tokens in one pass is measured too, as "no cache".
    """
    length = len(text) - 1
    sequences = {
        contestant.name: QuantizedSequence(contestant, model.num_layers, length, calibrated)
        for contestant in (reference, *contestants)
    }
    uncached = model.logits(text[:num_uncached], 0, None) if num_uncached else None
    found: dict[str, list[TokenMeasurements]] = {}
    for first in range(0, length, MAX_QUERY_TOKENS):
        tokens, targets = (
            text[first : min(first + MAX_QUERY_TOKENS, length)],
            text[first + 1 : first + MAX_QUERY_TOKENS + 1],
        )
        expected = _block_logits(model, tokens, first, sequences[reference.name])
        for contestant in contestants:
            logits = _block_logits(model, tokens, first, sequences[contestant.name])
            found.setdefault(contestant.name, []).append(measure_tokens(expected, logits, targets))
        if uncached is not None and first < num_uncached:
            count = min(len(tokens), num_uncached - first)
            part = measure_tokens(expected[:count], uncached[first : first + count], targets[:count])
            found.setdefault(UNCACHED, []).append(part)
        advance(len(tokens))
    return TextResult(
        {name: TokenMeasurements.concatenate(parts) for name, parts in found.items()},
        _storage(list(sequences.values())),
    )


def _block_logits(model: LanguageModel, tokens: Tensor, first: int, sequence: QuantizedSequence) -> Tensor:
    """The model sees as many tokens at once as the contestant's decode call takes."""
    block = sequence.contestant.query_block
    parts = [model.logits(tokens[i : i + block], first + i, sequence) for i in range(0, len(tokens), block)]
    return torch.cat(parts)


def _storage(sequences: list[QuantizedSequence]) -> dict[str, Storage]:
    """Rounds over all contestants, so that a slow moment of the machine hits all alike; medians."""
    seconds = [[sequence.seconds_per_step() for sequence in sequences] for _ in range(TIMING_ROUNDS)]
    medians = np.median(np.array(seconds), axis=0)
    return {
        sequence.contestant.name: Storage(sequence.nbytes, sequence.num_values, float(median))
        for sequence, median in zip(sequences, medians, strict=True)
    }


@dataclass(frozen=True)
class GreedyResult:
    """Greedy continuations of one prompt."""

    tokens: dict[str, NDArray[np.int64]]  # [count] of each contestant
    top_gap: NDArray[np.float64]  # [count], probability of the reference's first choice minus its second


def decode_greedily(
    model: LanguageModel,
    prompt: Tensor,
    count: int,
    reference: Contestant,
    contestants: list[Contestant],
    calibrated: list[Calibration] | None,
    advance: Callable[[int], None],
) -> GreedyResult:
    """Continues prompt [n] by `count` most likely tokens, each fed back; all attention reads the cache."""
    chosen: dict[str, NDArray[np.int64]] = {}
    top_gap = np.zeros(count)
    for contestant in (reference, *contestants):
        sequence = QuantizedSequence(contestant, model.num_layers, len(prompt) + count, calibrated)
        for first in range(0, len(prompt), MAX_QUERY_TOKENS):
            logits = _block_logits(model, prompt[first : first + MAX_QUERY_TOKENS], first, sequence)
        tokens: list[Tensor] = []
        for step in range(count):
            if contestant is reference:
                best = logits[-1].double().softmax(-1).topk(2).values
                top_gap[step] = float(best[0] - best[1])
            tokens.append(logits[-1].argmax()[None])
            if step + 1 < count:
                logits = model.logits(tokens[-1], len(prompt) + step, sequence)
        chosen[contestant.name] = torch.cat(tokens).cpu().numpy()
        advance(count)
    return GreedyResult(chosen, top_gap)


def first_divergence(reference: NDArray[np.int64], tokens: NDArray[np.int64]) -> int:
    """The first index at which two continuations differ; their length where they do not.

    >>> first_divergence(np.array([1, 2, 3]), np.array([1, 2, 4]))
    2
    """
    differs = reference != tokens
    return int(differs.argmax()) if differs.any() else len(reference)
