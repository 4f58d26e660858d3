"""Decoding steps of a whole model, every contender on its own cache of the same keys and values."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .generate_contenders import REFERENCE, Contender, fill, noise_contender, register_maskless
from .generate_models import GenerateShape, make_model, random_kv, set_of
from .results import OURS, Row

WARM_UP_STEPS = 4  # the first one makes room in a growing cache, and torch's allocator settles
TIMED_STEPS = 16
# What a layer may add to the relative error of the logits of a random model, beyond summing in another order: a cache
# that is not read, or read wrongly, gives logits that have nothing to do with the reference's.
ERROR_PER_LAYER = {"int8": 0.005, "fp8_e4m3": 0.02, "fp8_e5m2": 0.04}
ERROR_PER_16_BIT_LAYER = 0.0005
NOISE_FACTOR = 3  # times the error of attention that sums in another order


@dataclass(frozen=True)
class Options:
    """How often everyone takes a turn, and who does not, for what reason."""

    rounds: int = 3
    steps: int = TIMED_STEPS
    missing_peers: dict[str, str] = field(default_factory=dict)


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
        self.model, self.shape = model, shape
        torch.backends.cuda.enable_cudnn_sdp(contender.has_cudnn)
        model.set_attn_implementation(contender.attention)
        self.cache = contender.make_cache(model.config, length)
        fill(self.cache, random_kv(model, shape, seed))
        self.tokens = torch.full((shape.batch_size, 1), 1, device=model.device)
        self.positions = torch.full((1, 1), shape.context, device=model.device)

    def skip(self, count: int) -> None:
        """Appends tokens without a step."""
        if count > 0:
            fill(self.cache, random_kv(self.model, replace(self.shape, context=count), count))
            self.positions.add_(count)

    def __call__(self) -> Tensor:
        """Takes a step; the buffers stay where they are, so that a step can be captured."""
        out = self.model(input_ids=self.tokens, position_ids=self.positions, past_key_values=self.cache, use_cache=True)
        logits: Tensor = out.logits[:, -1]
        self.tokens.copy_(logits.argmax(-1, keepdim=True))
        self.positions.add_(1)
        return logits


class CapturedStep:
    """A step as one CUDA graph. Capturing does not run it."""

    def __init__(self, steps: Steps) -> None:
        # A growing cache lets go of the tensors that a step read, and every replay reads them again.
        self.read = [dict(vars(layer)) for layer in steps.cache.layers]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            steps()

    def __call__(self) -> None:
        self.graph.replay()


def take_turn(
    model: Any, contender: Contender, shape: GenerateShape, seed: int, options: Options, skipped: int = 0
) -> Turn:
    """Fills a cache, warms up, times; the cache is gone afterwards, since all of them would not fit. `skipped` tokens
    come between the first step, whose logits are kept, and the others."""
    is_cuda = model.device.type == "cuda"
    before = torch.cuda.memory_allocated() if is_cuda else 0
    steps = Steps(model, contender, shape, shape.context + skipped + WARM_UP_STEPS + options.steps, seed)
    cache_bytes = torch.cuda.memory_allocated() - before if is_cuda else 0
    logits = steps().float()
    steps.skip(skipped)
    for _ in range(WARM_UP_STEPS - 1):
        steps()
    call: Callable[[], object] = CapturedStep(steps) if contender.is_graph else steps
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


def noise_error(model: Any, shape: GenerateShape, expected: Tensor) -> float:
    """Relative error of the logits where only the order of summation differs."""
    with torch.inference_mode():
        return relative_error(Steps(model, noise_contender(), shape, 0, 0)().float(), expected)


def relative_error(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).norm() / expected.norm())


def measure_shape(model: Any, shape: GenerateShape, contenders: Sequence[Contender], options: Options) -> list[Row]:
    """Interleaved turns of everyone; who cannot run once is left alone afterwards."""
    turns: dict[str, list[Turn]] = {contender.name: [] for contender in contenders}
    failures: dict[str, str] = {}
    skipped = 0
    # Memory that is new to the process slows every launch for seconds, so the first turn of a shape does not count.
    order = [(0, contenders[0]), *((seed, contender) for seed in range(options.rounds) for contender in contenders)]
    for number, (seed, contender) in enumerate(order):
        if contender.name in failures:
            continue
        if contender.plans_each_length:  # lengths that no turn has had
            skipped += WARM_UP_STEPS + options.steps
        try:
            with torch.inference_mode():
                turn = take_turn(model, contender, shape, seed, options, skipped if contender.plans_each_length else 0)
        except Exception as error:  # of somebody else's code, and too little memory
            failures[contender.name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            turns[contender.name] += [turn] if number > 0 else []
        gc.collect()
        if contender.name in failures and model.device.type == "cuda":
            torch.cuda.empty_cache()  # what it could get; while a graph is captured, the allocator gives nothing back
    if REFERENCE in failures:
        failures = dict.fromkeys(turns, f"no reference: {failures[REFERENCE]}") | failures
    return _rows(model, shape, turns, failures)


def _rows(model: Any, shape: GenerateShape, turns: dict[str, list[Turn]], failures: dict[str, str]) -> list[Row]:
    noise = noise_error(model, shape, turns[REFERENCE][0].logits) if REFERENCE not in failures else 0.0
    rows = []
    for name, taken in turns.items():
        row: Row = {"shape": shape.label, "set": set_of(shape), "sizes": shape.sizes(), "contender": name}
        if model.device.type == "cpu":
            row["threads"] = torch.get_num_threads()
        if name in failures:
            rows.append(row | {"failure": failures[name]})
            continue
        row |= _figures(shape, taken, turns[REFERENCE][0].logits) | {"noise_error": noise}
        if name.startswith(OURS):
            row["max_error"] = max_error(name, model.config.num_hidden_layers, noise)
        rows.append(row)
    return rows


def max_error(name: str, num_layers: int, noise: float) -> float:
    """Of one of our contenders."""
    kv_format = name.removeprefix(OURS).split()[0]
    return NOISE_FACTOR * noise + num_layers * ERROR_PER_LAYER.get(kv_format, ERROR_PER_16_BIT_LAYER)


def _figures(shape: GenerateShape, turns: list[Turn], reference: Tensor) -> Row:
    times = [turn.milliseconds for turn in turns]
    return {
        "milliseconds": statistics.median(times),
        "milliseconds_range": [min(times), max(times)],
        "tokens_per_second": shape.batch_size / statistics.median(times) * 1e3,
        "cache_bytes": turns[0].cache_bytes,
        "peak_bytes": max(turn.peak_bytes for turn in turns),
        "relative_error": relative_error(turns[0].logits, reference),
    }


def run(
    shapes: Sequence[GenerateShape],
    contenders: Sequence[Contender],
    device: str,
    options: Options,
    report: Callable[[list[Row], dict[str, Any]], None],
) -> dict[str, Any]:
    """Measures every shape, one model after the other; `report` gets the rows of each, and what the run is of."""
    found: dict[str, Any] = {"steps": options.steps, "rounds": options.rounds, "missing_peers": options.missing_peers}
    register_maskless()
    for name in dict.fromkeys(shape.model for shape in shapes):
        model = make_model(name, device)
        found["weight_bytes"] = sum(weight.nbytes for weight in model.parameters())
        for shape in shapes:
            if shape.model == name:
                report(measure_shape(model, shape, contenders, options), found)
    return found
