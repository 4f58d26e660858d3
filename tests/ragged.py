"""Ragged batches, for prefill_attention and hybrid_attention: problems of cases.py with query lengths of their own."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import oracle
import pytest
import torch
from bridge import (
    OUTPUT_ROUNDING,
    assert_ran,
    compare,
    kernel_tolerance,
    keywords,
    make_cache,
    query_tensor,
    tensor_of_values,
    values_of_tensor,
)
from cases import Case, Problem, draw_options, draw_starts, free_of_poison, make_problem, round_to, visible_keys
from comparison import assert_close, assert_close_absolute
from numpy.typing import NDArray

import pyquantattn


@dataclass(frozen=True)
class RaggedCase(Case):
    """`seq_lens` are the keys of each sequence; over fresh K and V `q_dtype` is their dtype as well."""

    seq_lens: tuple[int, ...] = (37, 0, 130, 1, 70)
    q_lens: tuple[int, ...] | None = None  # None: whole prompts, as many query tokens as keys
    causal: bool = True

    @property
    def query_lengths(self) -> tuple[int, ...]:
        return self.seq_lens if self.q_lens is None else self.q_lens

    @property
    def query_shape(self) -> tuple[int, ...]:
        return sum(self.query_lengths), self.num_q_heads, self.head_dim

    @property
    def ragged_options(self) -> dict:
        return {"cu_seqlens_q": cumulative(self.query_lengths), "causal": self.causal}


def cumulative(lengths: tuple[int, ...]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def rows_of(case: RaggedCase) -> list[slice]:
    """The query rows of each sequence."""
    return [slice(int(first), int(end)) for first, end in pairwise(cumulative(case.query_lengths))]


@dataclass
class HybridProblem(Problem):
    """q is [T, Hq, D]."""

    @property
    def options(self) -> dict:
        return super().options | self.case.ragged_options

    def expected(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        pages = self.dequantized()
        return free_of_poison(oracle.hybrid_attention(self.q, *pages, seq_lens=self.seq_lens, **self.options))


def make_hybrid_problem(case: RaggedCase) -> HybridProblem:
    return HybridProblem(**vars(make_problem(case)))


@dataclass
class PrefillProblem:
    """A case over fresh K and V, with NaN in every key that no query token sees."""

    case: RaggedCase
    q: NDArray[np.float64]  # [T, Hq, D], exact in q_dtype
    k: NDArray[np.float64]  # [S, Hkv, D], exact in q_dtype
    v: NDArray[np.float64]
    seq_starts: NDArray[np.int32] | None
    alibi_slopes: NDArray[np.float32] | None
    sinks: NDArray[np.float32] | None

    @property
    def options(self) -> dict:
        case = self.case
        optional = {
            "seq_starts": self.seq_starts,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
            "sm_scale": case.sm_scale,
            "sliding_window": case.sliding_window,
            "logits_soft_cap": case.logits_soft_cap,
            "cu_seqlens_k": None if case.q_lens is None else cumulative(case.seq_lens),
        }
        return case.ragged_options | {name: value for name, value in optional.items() if value is not None}

    def expected(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return free_of_poison(oracle.prefill_attention(self.q, self.k, self.v, **self.options))


def make_prefill_problem(case: RaggedCase) -> PrefillProblem:
    rng = np.random.default_rng(case.seed)
    starts = draw_starts(rng, case)
    shape = (sum(case.seq_lens), case.num_kv_heads, case.head_dim)
    per_head = 1 + 0.3 * np.arange(case.num_kv_heads)[:, None]
    k, v = (round_to(size * per_head * rng.normal(size=shape), case.q_dtype) for size in (0.6, 1.7))
    is_seen = np.zeros(len(k), bool)
    for b, first in enumerate(cumulative(case.seq_lens)[:-1]):
        seen = visible_keys(case, b, 0 if starts is None else int(starts[b]))
        is_seen[first + seen.start : first + seen.stop] = True
    k[~is_seen] = v[~is_seen] = np.nan
    slopes, sinks = draw_options(rng, case)
    q = round_to(1.3 * rng.normal(size=case.query_shape), case.q_dtype)
    return PrefillProblem(case, q, k, v, starts, slopes, sinks)


def has_prefill_of(dtype: str, device: str) -> bool:
    """Whether the backend has a kernel for fresh K and V of a dtype."""
    return pyquantattn.supports(None, 64, operation="prefill_attention", q_dtype=getattr(torch, dtype), device=device)


def need_prefill_of(dtype: str, device: str) -> None:
    """Skips the test where it has none (the whole test: one of Hypothesis assumes has_prefill_of() instead)."""
    if not has_prefill_of(dtype, device):
        pytest.skip(f"the {device} backend has no kernel for prefill_attention of {dtype}")


def prefill_arguments(problem: PrefillProblem, device: str) -> tuple[torch.Tensor, ...]:
    """q, k, v"""
    need_prefill_of(problem.case.q_dtype, device)
    return tuple(tensor_of_values(x, problem.case.q_dtype, device) for x in (problem.q, problem.k, problem.v))


def prefill_keywords(problem: PrefillProblem, device: str) -> dict:
    return {
        name: torch.from_numpy(value).to(device) if isinstance(value, np.ndarray) else value
        for name, value in problem.options.items()
    }


def prefill_tensors(problem: PrefillProblem, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), computed on the backend of `device` and on no other."""
    result = pyquantattn.prefill_attention(
        *prefill_arguments(problem, device), return_lse=True, **prefill_keywords(problem, device)
    )
    assert_ran("prefill_attention", device)
    return result


def hybrid_tensors(problem: HybridProblem, device: str, **run_options) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), computed on the backend of `device` and on no other."""
    q, cache, given = query_tensor(problem, device), make_cache(problem, device), keywords(problem, device)
    result = pyquantattn.hybrid_attention(q, cache, return_lse=True, **given, **run_options)
    assert_ran("hybrid_attention", device)
    return result


def arrays(result: tuple[torch.Tensor, torch.Tensor]) -> tuple[NDArray, NDArray]:
    return values_of_tensor(result[0]), values_of_tensor(result[1])


# K and V of a prefill have the dtype of a 16-bit cache, or float32, which is at least as exact.
FORMAT_OF_DTYPE = {"float32": "fp16", "float16": "fp16", "bfloat16": "bf16"}


def prefill_tolerance(dtype: str, device: str) -> float:
    return kernel_tolerance(FORMAT_OF_DTYPE[dtype], device)


def check_prefill(problem: PrefillProblem, device: str) -> None:
    """The package's result equals the reference."""
    compare(problem, arrays(prefill_tensors(problem, device)), prefill_tolerance(problem.case.q_dtype, device), {})


def check_hybrid(problem: HybridProblem, device: str, **run_options) -> None:
    """The package's result equals the reference."""
    tolerance = kernel_tolerance(problem.case.kv_format, device)
    compare(problem, arrays(hybrid_tensors(problem, device, **run_options)), tolerance, run_options)


def assert_agree(first, second, kv_format, device, q_dtype="float16"):
    """Two results that both lie within the tolerance of the truth lie within twice that of each other."""
    tolerance = 2 * kernel_tolerance(kv_format, device)
    (out, lse), (other_out, other_lse) = arrays(first), arrays(second)
    assert_close(out, other_out, relative=tolerance, rounding=2 * OUTPUT_ROUNDING[q_dtype])
    assert_close_absolute(lse, other_lse, tolerance=2 * tolerance, what="lse")


def assert_same_results(first, second, kv_format, device, q_dtype) -> None:
    """The same bits, on a CPU. A GPU may take another kernel for a layout that its copy engine does not read."""
    if device == "cpu":
        for x, y in zip(first, second, strict=True):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
    else:
        assert_agree(first, second, kv_format, device, q_dtype)
