"""Prefill and hybrid batches on a CUDA device: who takes part on a shape, timed in turn, outputs checked."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

import pyquantattn as qa

from . import batch_contenders, cuda_batch_peers, cuda_timing
from .batch_contenders import BatchContender, BatchData, Place
from .batch_shapes import HybridShape, PrefillShape
from .cuda_contenders import Options, attempt, release
from .cuda_timing import num_copies
from .results import OURS, Row

PLACE = Place("cuda", torch.float16, num_copies, num_fresh_copies=num_copies)


def contenders_of(
    data: BatchData, shape: PrefillShape | HybridShape, options: Options
) -> dict[str, Callable[[], BatchContender]]:
    """Everybody who takes part on a shape, by name, not yet built."""
    ours = batch_contenders.ours(data, shape, options.kv_formats)
    return ours | cuda_batch_peers.peers_of(data, shape, options.peers)


@dataclass(frozen=True)
class Prepared:
    """A contender with its output checked and its calls captured."""

    contender: BatchContender  # holds what the graph reads and writes
    facts: Row
    replay: cuda_timing.Replay


def _prepare(construct: Callable[[], Any], facts_of: Callable[[Any], Row]) -> Prepared:
    contender = construct()
    facts = facts_of(contender)
    if contender.name.startswith(OURS):
        facts |= {"variant": qa.last_kernel().variant}
    calls = [partial(contender.call, copy) for copy in range(contender.num_copies)]
    return Prepared(contender, facts, cuda_timing.Replay(calls))


def measure_shape(shape: PrefillShape | HybridShape, options: Options, matrix_rate: float) -> list[Row]:
    """One row per contender; one that cannot run gives a row that says why. matrix_rate: GFLOP/s of matrix products."""
    data = BatchData.random(shape, PLACE)
    about: Row = {"shape": shape.label, "sizes": asdict(shape), "flop": shape.flop}
    facts_of = partial(batch_contenders.facts, data)
    found = {
        name: attempt(partial(_prepare, construct, facts_of))
        for name, construct in contenders_of(data, shape, options).items()
    }
    prepared = [one for one in found.values() if isinstance(one, Prepared)]
    turns = iter(cuda_timing.interleaved_microseconds([one.replay for one in prepared]))
    rows = []
    for name, one in found.items():
        measured = _measured(next(turns), shape.flop, matrix_rate) | one.facts if isinstance(one, Prepared) else one
        rows.append(about | {"contender": name} | measured)
    del found, prepared
    release()
    return rows


def _measured(microseconds: list[float], flop: int, matrix_rate: float) -> Row:
    rate = flop / statistics.median(microseconds) / 1e3
    return {
        "milliseconds": round(statistics.median(microseconds) / 1e3, 6),
        "fastest_turn": round(min(microseconds) / 1e3, 6),
        "slowest_turn": round(max(microseconds) / 1e3, 6),
        "gigaflop_per_second": round(rate, 1),
        "percent_of_matrix_rate": round(100 * rate / matrix_rate, 1),
    }
