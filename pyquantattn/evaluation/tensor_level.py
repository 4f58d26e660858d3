"""Levels 0 and 1: what encoding does to given K and V, and what attention over the codes does to its output.

    codec error   exact float64 attention over code * scale, against exact attention over the original K and V
    kernel error  decode_attention, against exact attention over code * scale
    output error  decode_attention, against exact attention over the original K and V: what a model gets

Errors of an output are the L2 distance of one vector (a query of a head) relative to the norm of the exact one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyquantattn.evaluation.exact import ExactAttention, exact_attention
from pyquantattn.evaluation.language_model import LayerTensors
from pyquantattn.evaluation.metrics import Floats
from pyquantattn.evaluation.sequence import (
    MAX_QUERY_TOKENS,
    Calibration,
    Contestant,
    LayerCache,
    largest_code,
)

Table = dict[str, Floats]  # columns of equal length
CODEC_METRICS = ("relative_rmse", "max_abs", "clipped_percent", "flushed_percent")
TOP_KEYS = 16  # keys of largest weight whose survival is counted
DISTANCES = (16, 128, 1024)  # tokens between query and key; what lies further is the last part
DISTANCE_METRICS = (*(f"weight_tv_to_{distance}" for distance in DISTANCES), "weight_tv_beyond")
ATTENTION_METRICS = (
    "output_error",
    "codec_error",
    "kernel_error",
    "cosine",
    "max_abs",
    "lse_error",
    "weight_kl",
    "weight_tv",
    "top_overlap",
    *DISTANCE_METRICS,
)


@dataclass(frozen=True)
class InputStatistics:
    """What K or V of a layer look like, per KV head and channel: the reason why a format is fragile on them."""

    crest: Floats  # [Hkv], mean over tokens of max |x| / rms of a vector; a Gaussian vector of 128 has 2.8
    reach: Floats  # [Hkv], the same with the rms of x - channel mean: what differs between tokens, in codes' range
    channel_mean: Floats  # [Hkv, D]
    channel_std: Floats  # [Hkv, D]

    @classmethod
    def of(cls, x: Tensor) -> InputStatistics:
        """Of x [L, Hkv, D]."""
        x = x.double()
        mean, largest = x.mean(0), x.abs().amax(-1)
        found = (_over_rms(largest, x), _over_rms(largest, x - mean), mean, x.std(0, unbiased=False))
        return cls(*(part.cpu().numpy() for part in found))


def _over_rms(largest: Tensor, x: Tensor) -> Tensor:
    rms = x.square().mean(-1).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return (largest / rms).mean(0)


def codec_table(layer: LayerTensors, cache: LayerCache) -> Table:
    """Level 0 of a filled cache: one row for each of K and V (is_v 0 or 1) and KV head."""
    rows: dict[str, list[float]] = {}
    for is_v, (original, encoded, codes, scale, numbers) in enumerate(_parts(layer, cache)):
        limit = scale * largest_code((cache.cache.v if is_v else cache.cache.k).dtype)
        for head in range(original.shape[1]):
            x, y, z = original[:, head].double(), numbers[:, head], encoded[:, head].double()
            row = {
                "is_v": is_v,
                "head": head,
                "relative_rmse": float((y - x).norm() / x.norm().clamp_min(1e-300)),
                "max_abs": float((y - x).abs().max()),
                "clipped_percent": 100 * float((z.abs() > limit[:, head, None]).double().mean()),
                "flushed_percent": 100 * float(((codes[:, head] == 0) & (z != 0)).double().mean()),
            }
            for name, value in row.items():
                rows.setdefault(name, []).append(value)
    return {name: np.array(values, dtype=np.float64) for name, values in rows.items()}


def _parts(layer: LayerTensors, cache: LayerCache) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """For K and V in the text's order: original, what of it was encoded, code values, scale [L, Hkv], decoded."""
    found = []
    order = cache.page_table[0].long()
    stored = cache.cache
    tensors = ((layer.k, stored.k, stored.k_scale, stored.k_offset), (layer.v, stored.v, stored.v_scale, None))
    for (original, codes, scale, offset), numbers in zip(tensors, cache.stored(), strict=True):
        in_order = codes.double()[order].flatten(0, 1)[: cache.length]
        if scale is None or scale.ndim < 2:
            scales = torch.ones(in_order.shape[:2]).double().to(codes.device) * (
                1.0 if scale is None else scale.double()
            )
        else:
            scales = scale.double()[order].flatten(0, 1)[: cache.length]
        encoded = original if offset is None else original - offset
        found.append((original, encoded, in_order, scales, numbers))
    return found


@dataclass(frozen=True)
class _Bucket:
    """The last queries of one context length."""

    context: int
    q: Tensor
    first_position: int
    exact: ExactAttention


def usable_contexts(layer: LayerTensors, contexts: tuple[int, ...]) -> list[int]:
    """The context lengths at which a layer has queries; its whole length where it has none of the wished ones."""
    wished = [context for context in contexts if layer.first_query < context <= layer.length]
    return wished or [layer.length]


@dataclass(frozen=True)
class LayerResult:
    """One contestant on one layer's tensors."""

    codec: Table  # empty for ablations
    attention: Table
    nbytes: int


def measure_layer(
    layer: LayerTensors,
    contestants: list[Contestant],
    contexts: tuple[int, ...],
    calibrated: Calibration | None,
    index: int,
    num_layers: int,
) -> dict[str, LayerResult]:
    """Every contestant on layer `index` of `num_layers`."""
    buckets = []
    for context in usable_contexts(layer, contexts):
        first = max(layer.first_query, context - MAX_QUERY_TOKENS)
        q = layer.q[first - layer.first_query : context - layer.first_query]
        exact = exact_attention(q, layer.k[:context], layer.v[:context], first, layer.options)
        buckets.append(_Bucket(context, q, first, exact))
    found = {}
    for contestant in contestants:
        storage = contestant.spec.layer(index, num_layers)
        cache = LayerCache(storage, layer.k, layer.length, calibrated, contestant.only)
        cache.append(layer.k, layer.v, contestant.scale_factor)
        tables = [_attention_table(layer, bucket, cache, contestant) for bucket in buckets]
        codec = codec_table(layer, cache) if contestant.only is None else {}
        found[contestant.name] = LayerResult(codec, join_tables(tables), cache.cache.nbytes)
    return found


def _attention_table(layer: LayerTensors, bucket: _Bucket, cache: LayerCache, contestant: Contestant) -> Table:
    k, v = (x[: bucket.context] for x in cache.stored())
    decoded = exact_attention(bucket.q, k, v, bucket.first_position, layer.options)
    out, exact = cache.attend(bucket.q, bucket.first_position, contestant, layer.options).double(), bucket.exact
    top = min(TOP_KEYS, bucket.first_position + 1)
    weights, moved = exact.weights, decoded.weights
    shifts = _shift_by_distance(0.5 * (weights - moved).abs(), bucket.first_position)
    log_ratio = weights.clamp_min(1e-300).log() - moved.clamp_min(1e-300).log()
    kept = torch.zeros_like(weights).scatter_(-1, weights.topk(top).indices, 1.0).gather(-1, moved.topk(top).indices)
    columns = {
        "output_error": _relative(out, exact.out),
        "codec_error": _relative(decoded.out, exact.out),
        "kernel_error": _relative(out, decoded.out),
        "cosine": torch.cosine_similarity(out, exact.out, dim=-1),
        "max_abs": (out - exact.out).abs().amax(-1),
        "lse_error": (decoded.lse - exact.lse).abs(),
        "weight_kl": (weights * log_ratio).sum(-1),
        "weight_tv": 0.5 * (weights - moved).abs().sum(-1),
        "top_overlap": kept.sum(-1) / top,
        **dict(zip(DISTANCE_METRICS, shifts, strict=True)),
    }
    positions, heads = torch.meshgrid(torch.arange(len(out)), torch.arange(out.shape[1]), indexing="ij")
    keys = {
        "context": torch.full_like(positions, bucket.context),
        "position": positions + bucket.first_position,
        "head": heads,
    }
    return {name: column.flatten().cpu().double().numpy() for name, column in (keys | columns).items()}


def _shift_by_distance(shift: Tensor, first_position: int) -> list[Tensor]:
    """Sums [n, Hq] of [n, Hq, L] over the keys of each part of the past, the nearest first."""
    positions = torch.arange(first_position, first_position + len(shift), device=shift.device)
    distance = positions[:, None] - torch.arange(shift.shape[-1], device=shift.device)
    part = torch.bucketize(distance, torch.tensor(DISTANCES, device=shift.device), right=True)
    return [(shift * (part == index)[:, None]).sum(-1) for index in range(len(DISTANCE_METRICS))]


def _relative(actual: Tensor, expected: Tensor) -> Tensor:
    distance: Tensor = (actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-300)
    return distance


def join_tables(tables: list[Table]) -> Table:
    """Rows of all tables, one after the other; tables without columns are left out."""
    filled = [table for table in tables if table]
    return {name: np.concatenate([table[name] for table in filled]) for name in filled[0]} if filled else {}


def with_column(table: Table, name: str, value: float) -> Table:
    """The table with one more, constant, column in front."""
    if not table:
        return {}
    length = len(next(iter(table.values())))
    return {name: np.full(length, value)} | table


def group_means(table: Table, metric: str, *keys: str) -> tuple[NDArray[np.float64], list[list[float]]]:
    """Means of a column over all rows with equal keys: an array with one axis for each key, and the axes' values."""
    axes = [sorted(set(table[key].tolist())) for key in keys]
    sums, counts = np.zeros([len(axis) for axis in axes]), np.zeros([len(axis) for axis in axes])
    places = tuple(np.searchsorted(axis, table[key]) for axis, key in zip(axes, keys, strict=True))
    np.add.at(sums, places, table[metric])
    np.add.at(counts, places, 1)
    return sums / np.maximum(counts, 1), axes
