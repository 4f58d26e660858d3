"""Decoding steps of a whole model, every contender on its own cache of the same keys and values."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .generate_contenders import REFERENCE, Contender, fill
from .generate_models import GenerateShape, make_model, random_kv, set_of
from .results import OURS, Row

WARM_UP_STEPS = 3  # the first step makes room in a growing cache
TIMED_STEPS = 16
# Of the logits, against the 16-bit reference: what a format may do to a random model, not what a kernel may.
MAX_ERRORS = {"int8": 0.05, "fp8_e4m3": 0.15, "fp8_e5m2": 0.3}
MAX_16_BIT_ERROR = 0.03


@dataclass(frozen=True)
class Options:
    """How often everyone takes a turn."""

    rounds: int = 3
    steps: int = TIMED_STEPS


@dataclass(frozen=True)
class Turn:
    """One turn of a contender on one shape."""

    milliseconds: float  # of a step
    cache_bytes: int  # 0 on a CPU, where torch does not count
    peak_bytes: int
    logits: Tensor  # [B, vocabulary] of the first step


class Steps:
    """Greedy decoding, one token of each sequence at a time, over a filled cache."""

    def __init__(self, model: Any, contender: Contender, shape: GenerateShape, length: int, seed: int) -> None:
        self.model = model
        model.set_attn_implementation(contender.attention)
        self.cache = contender.make_cache(model.config, length)
        fill(self.cache, random_kv(model, shape, seed))
        self.tokens = torch.full((shape.batch_size, 1), 1, device=model.device)
        self.positions = torch.full((1, 1), shape.context, device=model.device)

    def __call__(self) -> Tensor:
        """Takes a step; the buffers stay where they are, so that a step can be captured."""
        out = self.model(input_ids=self.tokens, position_ids=self.positions, past_key_values=self.cache, use_cache=True)
        logits: Tensor = out.logits[:, -1]
        self.tokens.copy_(logits.argmax(-1, keepdim=True))
        self.positions.add_(1)
        return logits


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """A step as one CUDA graph. Capturing does not run it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def take_turn(model: Any, contender: Contender, shape: GenerateShape, seed: int, options: Options) -> Turn:
    """Fills a cache, warms up, times; the cache is gone afterwards, since all of them would not fit."""
    is_cuda = model.device.type == "cuda"
    before = torch.cuda.memory_allocated() if is_cuda else 0
    steps = Steps(model, contender, shape, shape.context + WARM_UP_STEPS + options.steps, seed)
    cache_bytes = torch.cuda.memory_allocated() - before if is_cuda else 0
    logits = steps().float()
    for _ in range(WARM_UP_STEPS - 1):
        steps()
    call: Callable[[], object] = captured(steps) if contender.is_graph else steps
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(options.steps):
        call()
    if is_cuda:
        torch.cuda.synchronize()
    milliseconds = (time.perf_counter() - start) / options.steps * 1e3
    return Turn(milliseconds, cache_bytes, torch.cuda.max_memory_allocated() if is_cuda else 0, logits)


def measure_shape(model: Any, shape: GenerateShape, contenders: Sequence[Contender], options: Options) -> list[Row]:
    """Interleaved turns of everyone; who cannot run once is left alone afterwards."""
    turns: dict[str, list[Turn]] = {contender.name: [] for contender in contenders}
    failures: dict[str, str] = {}
    for seed in range(options.rounds):
        for contender in contenders:
            if contender.name in failures:
                continue
            try:
                with torch.inference_mode():
                    turns[contender.name].append(take_turn(model, contender, shape, seed, options))
            except Exception as error:  # of somebody else's code, and too little memory
                failures[contender.name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            gc.collect()
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
    return [
        _row(contender, shape, model.device.type, turns[contender.name], turns[REFERENCE], failures.get(contender.name))
        for contender in contenders
    ]


def _row(
    contender: Contender,
    shape: GenerateShape,
    device: str,
    turns: list[Turn],
    reference: list[Turn],
    failure: str | None,
) -> Row:
    row: Row = {"shape": shape.label, "set": set_of(shape), "sizes": shape.sizes(), "contender": contender.name}
    if device == "cpu":
        row["threads"] = torch.get_num_threads()
    if failure is not None:
        return row | {"failure": failure}
    milliseconds = statistics.median(turn.milliseconds for turn in turns)
    row |= {
        "milliseconds": milliseconds,
        "milliseconds_range": [min(turn.milliseconds for turn in turns), max(turn.milliseconds for turn in turns)],
        "tokens_per_second": shape.batch_size / milliseconds * 1e3,
        "cache_bytes": turns[0].cache_bytes,
        "peak_bytes": max(turn.peak_bytes for turn in turns),
    }
    if reference:
        expected = reference[0].logits
        row["relative_error"] = float((turns[0].logits - expected).norm() / expected.norm())
        if contender.name.startswith(OURS):
            name = contender.name.removeprefix(OURS).split()[0]
            row["max_error"] = MAX_ERRORS.get(name, MAX_16_BIT_ERROR)
    return row


def run(
    shapes: Sequence[GenerateShape],
    contenders: Sequence[Contender],
    device: str,
    options: Options,
    report: Callable[[list[Row], dict[str, Any]], None],
) -> dict[str, Any]:
    """Measures every shape, one model after the other; `report` gets the rows of each."""
    found: dict[str, Any] = {"steps": options.steps, "rounds": options.rounds}
    for name in dict.fromkeys(shape.model for shape in shapes):
        model = make_model(name, device)
        found["weight_bytes"] = sum(weight.nbytes for weight in model.parameters())
        for shape in shapes:
            if shape.model == name:
                report(measure_shape(model, shape, contenders, options), found)
    return found
