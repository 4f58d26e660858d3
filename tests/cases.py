"""Random decoding problems: a `Case` names the shape and features, `make_problem` draws the data and poisons the rest.

Poison is whatever would show in a result if it were read: NaN codes, NaN and infinite scales, absurd page ids. It fills
every slot that no query token may see: past the length, before the first visible key, outside every window, and all
pages that no sequence owns, page 0 among them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import oracle
from numpy.typing import NDArray
from oracle.codecs import Format, decode, encode

GARBAGE_PAGE_IDS = (-1, 2**31 - 1, 10**9, -(2**31), 0)


@dataclass(frozen=True)
class Case:
    seq_lens: tuple[int, ...] = (37, 0, 130, 1)
    kv_format: str = "int8"
    scales: str = "token_head"  # or "head", "tensor": static
    q_dtype: str = "float16"
    num_q_tokens: int = 1
    num_kv_heads: int = 2
    group: int = 2  # query heads per KV head
    head_dim: int = 64
    page_size: int | None = 16  # None: contiguous, one page per sequence
    layout: str = "NHD"
    alibi: str | None = None  # "heads": [Hq], "rows": [B, Hq]
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    has_sinks: bool = False
    has_starts: bool = False
    sm_scale: float | None = None
    key_offset: float = 0.0  # spread of the offsets of key channels; 0: the cache has none
    seed: int = 0

    @property
    def num_q_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def query_lengths(self) -> tuple[int, ...]:
        """Query tokens of each sequence."""
        return (self.num_q_tokens,) * len(self.seq_lens)

    @property
    def query_shape(self) -> tuple[int, ...]:
        return len(self.seq_lens), self.num_q_tokens, self.num_q_heads, self.head_dim

    def __str__(self) -> str:
        """The fields that differ from the default: the test's id."""
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(changed).replace(" ", "") or "default"


@dataclass
class Problem:
    """A case with data. Codes and scales are bit patterns and float64 values in [page, token, head, ...] order."""

    case: Case
    q: NDArray[np.float64]  # [B, n, Hq, D], exact in q_dtype
    k_codes: NDArray
    v_codes: NDArray
    k_scale: NDArray | None
    v_scale: NDArray | None
    seq_lens: NDArray[np.int32]
    page_table: NDArray[np.int32] | None
    seq_starts: NDArray[np.int32] | None
    alibi_slopes: NDArray[np.float32] | None
    sinks: NDArray[np.float32] | None
    k_offset: NDArray[np.float32] | None = None  # [Hkv, D]; the keys are what K's codes stand for, plus this

    @property
    def options(self) -> dict:
        """Keywords that the reference and the package share."""
        case = self.case
        arrays = {
            "page_table": self.page_table,
            "seq_starts": self.seq_starts,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
        }
        scalars = {
            "sm_scale": case.sm_scale,
            "sliding_window": case.sliding_window,
            "logits_soft_cap": case.logits_soft_cap,
        }
        return {name: value for name, value in (arrays | scalars).items() if value is not None}

    def dequantized(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """K and V pages as numbers, poison included."""
        k_format, v_format = oracle.split_pair(self.case.kv_format)
        with np.errstate(invalid="ignore"):
            k_pages = oracle.dequantize(self.k_codes, k_format, self.k_scale, self.k_offset)
            v_pages = oracle.dequantize(self.v_codes, v_format, self.v_scale)
        return k_pages, v_pages

    def expected(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The reference result over the stored bytes, dequantised in float64."""
        return free_of_poison(
            oracle.decode_attention(self.q, *self.dequantized(), seq_lens=self.seq_lens, **self.options)
        )


def free_of_poison(result: tuple[NDArray, NDArray]) -> tuple[NDArray, NDArray]:
    """A result of the reference, which counts only if it read none itself."""
    out, lse = result
    assert np.isfinite(out).all() and not np.isnan(lse).any(), "the reference itself read poison"
    return out, lse


def visible_keys(case: Case, sequence: int, start: int) -> range:
    """Every key that any query token of the sequence sees."""
    length, num_queries = case.seq_lens[sequence], case.query_lengths[sequence]
    if num_queries == 0:
        return range(0)
    window = np.inf if case.sliding_window is None else case.sliding_window
    first_position = length - num_queries
    return range(int(min(length, max(start, first_position - window + 1, 0))), length)


def round_to(x: NDArray, dtype: str) -> NDArray[np.float64]:
    if dtype == "float32":
        return x.astype(np.float32).astype(np.float64)
    fmt = oracle.FORMATS[{"float16": "fp16", "bfloat16": "bf16"}[dtype]]
    return decode(encode(x, fmt), fmt)


def draw_page_table(rng: np.random.Generator, case: Case) -> tuple[NDArray[np.int32], int]:
    """Distinct random pages for live tokens, garbage after them. Page 0 and some others belong to nobody."""
    assert case.page_size is not None
    live = [-(-length // case.page_size) for length in case.seq_lens]
    num_pages = sum(live) + 3
    order = iter(rng.permutation(np.arange(1, num_pages)))
    table = rng.choice(np.array(GARBAGE_PAGE_IDS), size=(len(live), max(live, default=0) + 2))
    for b, count in enumerate(live):
        table[b, :count] = [next(order) for _ in range(count)]
    return table.astype(np.int32), num_pages


def poison_codes(rng: np.random.Generator, shape: tuple[int, ...], fmt: Format) -> NDArray:
    bad = {
        "fp16": (0x7E00, 0x7C00, 0xFC00, 0xFFFF),
        "bf16": (0x7FC0, 0x7F80, 0xFF80, 0xFFFF),
        "int8": tuple(range(-128, 128)),
        "fp8_e4m3": (0x7F, 0xFF),
        "fp8_e5m2": (0x7C, 0x7D, 0x7E, 0x7F, 0xFC, 0xFF),
    }[fmt.name]
    return rng.choice(np.array(bad), size=shape).astype(fmt.code_dtype)


def poison_scales(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    return rng.choice(np.array([np.nan, np.inf, -np.inf]), size=shape)


def static_scale(values: NDArray, fmt: Format, granularity: str, spread: float) -> NDArray[np.float32]:
    """Per head or one for all; a little too small for the largest elements; another one for every head, K and V."""
    assert fmt.max_code is not None
    amax = np.abs(values).max(axis=(0, 1, 3)) * 0.9
    per_head = amax / fmt.max_code * (1 + spread * np.arange(len(amax)))
    return (per_head if granularity == "head" else per_head.mean()).astype(np.float32)


def draw_side(rng: np.random.Generator, case: Case, fmt: Format, shape: tuple[int, ...], size: float, is_live: NDArray):
    """Codes and scale of K or of V: Gaussian with a magnitude of its own for every head, poison where nobody looks."""
    per_head = size * (1 + 0.3 * np.arange(case.num_kv_heads))
    values = (rng.normal(size=shape) * per_head[:, None]).astype(np.float32)
    scale = None
    if fmt.has_scale and case.scales != "token_head":
        scale = static_scale(values, fmt, case.scales, spread=0.1 * size)
    codes, scale = oracle.quantize(values, fmt, scale)
    codes = np.where(is_live[..., None, None], codes, poison_codes(rng, shape, fmt))
    if fmt.has_scale and case.scales == "token_head":
        scale = np.where(is_live[..., None], scale, poison_scales(rng, shape[:-1]))
    return codes, scale


def live_slots(
    case: Case, table: NDArray | None, num_pages: int, page_size: int, starts: NDArray | None
) -> NDArray[np.bool_]:
    is_live = np.zeros((num_pages, page_size), bool)
    for b in range(len(case.seq_lens)):
        for j in visible_keys(case, b, 0 if starts is None else int(starts[b])):
            page = b if table is None else table[b, j // page_size]
            is_live[page, j % page_size] = True
    return is_live


def draw_options(rng: np.random.Generator, case: Case) -> tuple[NDArray | None, NDArray | None]:
    """(alibi_slopes, sinks)"""
    slopes = None
    if case.alibi is not None:
        shape = (case.num_q_heads,) if case.alibi == "heads" else (len(case.seq_lens), case.num_q_heads)
        slopes = rng.uniform(0.01, 0.5, size=shape).astype(np.float32)
    return slopes, rng.normal(size=case.num_q_heads).astype(np.float32) if case.has_sinks else None


def draw_starts(rng: np.random.Generator, case: Case) -> NDArray[np.int32] | None:
    if not case.has_starts:
        return None
    return np.array([rng.integers(0, length + 2) for length in case.seq_lens], np.int32)


def make_problem(case: Case) -> Problem:
    rng = np.random.default_rng(case.seed)
    batch_size = len(case.seq_lens)
    if case.page_size is None:
        table, num_pages, page_size = None, batch_size + 1, max(case.seq_lens, default=0) + 3
    else:
        (table, num_pages), page_size = draw_page_table(rng, case), case.page_size
    starts = draw_starts(rng, case)
    is_live = live_slots(case, table, num_pages, page_size, starts)
    shape = (num_pages, page_size, case.num_kv_heads, case.head_dim)
    k_format, v_format = oracle.split_pair(case.kv_format)
    k_codes, k_scale = draw_side(rng, case, k_format, shape, 0.6, is_live)
    v_codes, v_scale = draw_side(rng, case, v_format, shape, 1.7, is_live)
    slopes, sinks = draw_options(rng, case)
    q = rng.normal(size=(sum(case.query_lengths), case.num_q_heads, case.head_dim))
    k_offset = case.key_offset * rng.normal(size=shape[2:]) if case.key_offset else None
    return Problem(
        case,
        round_to(1.3 * q, case.q_dtype).reshape(case.query_shape),
        k_codes,
        v_codes,
        k_scale,
        v_scale,
        np.array(case.seq_lens, np.int32),
        table,
        starts,
        slopes,
        sinks,
        None if k_offset is None else k_offset.astype(np.float32),
    )


def with_large_k_scales(problem: Problem, median: float = 7.0) -> Problem:
    """The problem with larger scales of K, and an sm_scale under which scores stay small."""
    factor = median / np.nanmedian(np.where(np.isfinite(problem.k_scale), problem.k_scale, np.nan))
    largest_code = oracle.split_pair(problem.case.kv_format)[0].max_code
    case = replace(problem.case, sm_scale=float(0.3 / largest_code))
    return replace(problem, case=case, k_scale=np.float16(problem.k_scale * factor).astype(np.float64))


def variations(base: Case, **choices: tuple) -> list[Case]:
    """One case for every value of every field, the others at `base`."""
    return [replace(base, **{name: value}) for name, values in choices.items() for value in values]
