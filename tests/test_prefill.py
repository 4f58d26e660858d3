"""prefill_attention equals the float64 reference over shapes, dtypes and features; its masks show key by key."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bridge import OUTPUT_ROUNDING, tensor_of_values, values_of_tensor
from cases import round_to
from comparison import assert_close, assert_close_absolute
from ragged import (
    RaggedCase,
    arrays,
    check_prefill,
    cumulative,
    make_prefill_problem,
    need_prefill_of,
    prefill_arguments,
    prefill_keywords,
    prefill_tensors,
    prefill_tolerance,
    rows_of,
)

import pyquantattn
from pyquantattn import prefill_attention

DTYPES = ["float32", "float16", "bfloat16"]
LONG = (130, 3, 0, 65)
SHORTER_Q = RaggedCase(q_lens=(5, 0, 130, 0, 33))
LONGER_Q = RaggedCase(q_lens=(40, 6, 130, 9, 71))
EVERYTHING = RaggedCase(
    q_lens=(37, 3, 100, 1, 75),
    alibi="rows",
    sliding_window=21,
    logits_soft_cap=6.0,
    has_sinks=True,
    has_starts=True,
    sm_scale=0.2,
)
both_ways = pytest.mark.parametrize("causal", [True, False])


@both_ways
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [RaggedCase(), SHORTER_Q, LONGER_Q], ids=["whole", "shorter_q", "longer_q"])
def test_prefill_matches_float64_reference(case, dtype, head_dim, causal, prefill_device):
    """Whole prompts, a suffix of them, and more query tokens than keys; sequences of no keys and of no queries."""
    check_prefill(make_prefill_problem(replace(case, q_dtype=dtype, head_dim=head_dim, causal=causal)), prefill_device)


@both_ways
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_features_together(dtype, seed, causal, prefill_device):
    check_prefill(make_prefill_problem(replace(EVERYTHING, q_dtype=dtype, causal=causal, seed=seed)), prefill_device)


@both_ways
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_features_over_many_blocks_of_query_tokens(dtype, causal, prefill_device):
    """More query tokens than one pass over the keys serves, the last of which fill a block only in part."""
    lengths = {"seq_lens": (450, 0, 300, 5, 33), "q_lens": (450, 3, 250, 1, 33), "sliding_window": 170}
    case = replace(EVERYTHING, group=5, q_dtype=dtype, causal=causal, **lengths)
    check_prefill(make_prefill_problem(case), prefill_device)


@pytest.mark.parametrize("head_dim", range(32, 257, 8))
@pytest.mark.parametrize("dtype", DTYPES)
def test_c4_every_head_dim_that_is_supported(dtype, head_dim, prefill_device):
    """C4: no head_dim is padded wrongly; one without a kernel is a clean error."""
    problem = make_prefill_problem(RaggedCase(q_dtype=dtype, head_dim=head_dim, seq_lens=(19, 70, 0), seed=head_dim))
    is_supported = pyquantattn.supports(
        None, head_dim, operation="prefill_attention", q_dtype=getattr(torch, dtype), device=prefill_device
    )
    if not is_supported:
        with pytest.raises(pyquantattn.UnsupportedError, match=f"head_dim {head_dim}"):
            prefill_tensors(problem, prefill_device)
        return
    check_prefill(problem, prefill_device)


@both_ways
@pytest.mark.parametrize("group", [1, 2, 4, 5, 8, 12, 71])
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_c5_f8_every_group_size(num_kv_heads, group, causal, prefill_device):
    """C5, F8: MHA, GQA and MQA, groups that are no power of two."""
    case = RaggedCase(group=group, num_kv_heads=num_kv_heads, seq_lens=(19, 0, 70), causal=causal)
    check_prefill(make_prefill_problem(case), prefill_device)


@pytest.mark.parametrize("group", [1, 5, 8])
def test_c5_constants_per_kv_head_do_not_bleed(group, prefill_device):
    """C5: V of KV head h is the constant h + 1, so each output names the head that it read."""
    problem = make_prefill_problem(RaggedCase(num_kv_heads=4, group=group, seq_lens=(9, 130, 17)))
    problem.v = np.ones(problem.v.shape) * np.arange(1.0, 5.0)[:, None]
    out, _ = arrays(prefill_tensors(problem, prefill_device))
    assert_close(out, np.repeat(np.arange(1.0, 5.0), group)[None, :, None] * np.ones(out.shape), relative=2e-3)


@both_ways
def test_b4_every_length(causal, prefill_device):
    """B4: every length past two tiles of 64."""
    case = RaggedCase(seq_lens=tuple(range(131)), num_kv_heads=1, group=1, head_dim=32, causal=causal)
    check_prefill(make_prefill_problem(case), prefill_device)


@both_ways
@pytest.mark.parametrize("num_queries", [1, 2, 15, 16, 17, 63, 64, 65])
def test_e1_every_number_of_query_tokens(num_queries, causal, prefill_device):
    """E1: causal order is bottom-right aligned, whether there are more keys or fewer."""
    lens = (0, 1, num_queries - 1, num_queries, num_queries + 1, 130)
    case = RaggedCase(seq_lens=lens, q_lens=(num_queries,) * len(lens), causal=causal)
    check_prefill(make_prefill_problem(case), prefill_device)


@both_ways
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 63, 64, 65, 129, 130, 131, 10**6])
@pytest.mark.parametrize("group", [1, 2])
def test_e2_sliding_window(group, window, causal, prefill_device):
    """E2: every window round tile and length boundaries; without causal order it bounds the past alone."""
    case = RaggedCase(seq_lens=LONG, sliding_window=window, causal=causal, group=group)
    check_prefill(make_prefill_problem(case), prefill_device)


@both_ways
@pytest.mark.parametrize("window", [None, 1, 2, 7, 16, 33])
def test_e2_one_hot_values_show_exactly_which_keys_were_seen(window, causal, prefill_device):
    """E1, E2: with V one-hot, the nonzero outputs are the visible keys and nothing else."""
    case = RaggedCase(
        seq_lens=(40, 61, 17), q_lens=(40, 30, 20), sliding_window=window, causal=causal, q_dtype="float32"
    )
    problem = make_prefill_problem(case)
    positions = np.concatenate([np.arange(length) for length in case.seq_lens])
    problem.k = np.nan_to_num(problem.k)
    problem.v = np.broadcast_to(np.eye(case.head_dim)[positions][:, None], problem.v.shape)
    out, _ = arrays(prefill_tensors(problem, prefill_device))
    for length, rows in zip(case.seq_lens, rows_of(case), strict=True):
        for i, row in enumerate(out[rows]):
            position = length - (rows.stop - rows.start) + i
            last = position if causal else length - 1
            first = 0 if window is None else max(0, position - window + 1)
            for head in row:
                assert set(np.flatnonzero(head)) == set(range(first, last + 1)), (length, position)


def test_e2_window_of_one_returns_the_value_itself(prefill_device):
    problem = make_prefill_problem(RaggedCase(sliding_window=1))
    out, lse = arrays(prefill_tensors(problem, prefill_device))
    np.testing.assert_array_equal(out, problem.v.repeat(problem.case.group, axis=1))
    assert np.isfinite(lse).all()


@both_ways
@pytest.mark.parametrize("seed", range(4))
def test_first_visible_key(seed, causal, prefill_device):
    check_prefill(make_prefill_problem(RaggedCase(has_starts=True, causal=causal, seed=seed)), prefill_device)


@both_ways
@pytest.mark.parametrize("alibi", ["heads", "rows"])
@pytest.mark.parametrize("group", [1, 3])
def test_e4_alibi(group, alibi, causal, prefill_device):
    """E4: slope * (j - p), per head or per sequence and head, for keys behind the position as well."""
    check_prefill(
        make_prefill_problem(RaggedCase(seq_lens=LONG, alibi=alibi, group=group, causal=causal)), prefill_device
    )


@both_ways
@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_e6_soft_cap(cap, causal, prefill_device):
    check_prefill(make_prefill_problem(RaggedCase(logits_soft_cap=cap, sm_scale=0.5, causal=causal)), prefill_device)


@pytest.mark.parametrize("sink", [-10.0, 0.0, 10.0])
def test_e5_sinks_count_once(sink, prefill_device):
    problem = make_prefill_problem(RaggedCase(has_sinks=True, seq_lens=(200, 0, 65), q_lens=(200, 4, 65)))
    problem.sinks[:] = sink + 0.25 * np.arange(len(problem.sinks))
    check_prefill(problem, prefill_device)


@pytest.mark.parametrize("sm_scale", [0.0, -0.3])
def test_a_scale_of_zero_or_below_is_a_scale_like_any_other(sm_scale, prefill_device):
    check_prefill(make_prefill_problem(RaggedCase(sm_scale=sm_scale)), prefill_device)


@both_ways
def test_a7_a_zero_query_gives_the_mean_of_visible_values(causal, prefill_device):
    """A7: lengths that are no multiple of a tile, uniform weights, with and without causal order."""
    problem = make_prefill_problem(RaggedCase(seq_lens=(1, 7, 33, 65, 127), causal=causal, q_dtype="float32"))
    problem.q[:] = 0
    out, lse = arrays(prefill_tensors(problem, prefill_device))
    for rows in rows_of(problem.case):
        values = problem.v[rows].repeat(problem.case.group, axis=1)
        counts = np.arange(1, len(values) + 1) if causal else np.full(len(values), len(values))
        sums = np.cumsum(values, axis=0) if causal else np.broadcast_to(values.sum(0), values.shape)
        assert_close(out[rows], sums / counts[:, None, None], relative=1e-5)
        np.testing.assert_allclose(lse[rows], np.log(counts)[:, None].repeat(lse.shape[1], 1), atol=1e-5)


@pytest.mark.parametrize("length_of_query", [50.0, 3000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_d10_large_logits_pick_one_row(dtype, length_of_query, prefill_device):
    """D10: scores in the thousands: the winner's V alone, no overflow."""
    problem = make_prefill_problem(RaggedCase(seq_lens=(40, 65), sm_scale=20.0, q_dtype=dtype, causal=False))
    winners = np.empty(problem.q.shape)
    for rows in rows_of(problem.case):
        for i in range(rows.start, rows.stop):
            for h in range(problem.case.num_q_heads):
                j = rows.start + (7 * h + i) % (rows.stop - rows.start)
                key = problem.k[j, h // problem.case.group]
                problem.q[i, h] = round_to(length_of_query * key / np.linalg.norm(key), dtype)
                winners[i, h] = problem.v[j, h // problem.case.group]
    expected_out, expected_lse = problem.expected()
    np.testing.assert_allclose(expected_out, winners, rtol=1e-6, err_msg="a near tie would prove nothing")
    out, lse = arrays(prefill_tensors(problem, prefill_device))
    assert_close(out, winners, relative=prefill_tolerance(dtype, prefill_device), rounding=OUTPUT_ROUNDING[dtype])
    # A score is as exact as float32 sums are: a few roundings of its own size.
    assert_close_absolute(lse, expected_lse, tolerance=1e-6 * expected_lse.max(), what="lse")


def near_uniform(length, dtype, device):
    """Relative error against float64 of rows that see `length` keys of near-uniform scores and one needle."""
    rng = np.random.default_rng(length)
    heads, dim, num_queries, num_distinct = 2, 64, 24, 1024
    k = round_to(0.05 * rng.normal(size=(num_distinct, heads, dim)), dtype)
    v = round_to(1 + 0.5 * rng.normal(size=(num_distinct, heads, dim)), dtype)
    q = round_to(rng.normal(size=(num_queries, heads, dim)), dtype)
    k[0] = round_to(0.6 * q[0], dtype)
    q[1:] = round_to(q[0] + 0.3 * q[1:], dtype)
    keys = np.where(np.arange(length) == length // 3, 0, rng.integers(1, num_distinct, size=length))
    counts = np.bincount(keys, minlength=num_distinct)
    scores = np.einsum("ihd,jhd->hij", q, k) / dim**0.5
    weights = counts * np.exp(scores - scores.max(axis=2, keepdims=True))
    expected = np.einsum("hij,jhd->ihd", weights / weights.sum(2, keepdims=True), v)
    tensors = [tensor_of_values(x, dtype, device) for x in (q, k, v)]
    order = torch.from_numpy(keys).to(device)
    ends = {"cu_seqlens_q": (0, num_queries), "cu_seqlens_k": (0, length)}
    out = prefill_attention(
        tensors[0],
        *(x[order] for x in tensors[1:]),
        causal=False,
        **{name: torch.tensor(end, dtype=torch.int32, device=device) for name, end in ends.items()},
    )
    return np.linalg.norm(values_of_tensor(out) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_d6_the_error_does_not_grow_with_the_length(dtype, prefill_device):
    """D6: 131,072 keys cost at most 1.5 times the error of 1,024, or what rounding the output costs. Tensor cores cut
    sums of 16 products off at 2^-23 of the total, 8,192 times."""
    need_prefill_of(dtype, prefill_device)
    short_error, long_error = (near_uniform(length, dtype, prefill_device) for length in (1024, 131072))
    rounding = {"float32": 1e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    rounding += 0 if prefill_device == "cpu" else 131072 / 16 * 2.0**-23
    assert long_error <= max(1.5 * short_error, rounding), f"{short_error:.2e} became {long_error:.2e}"


def test_lengths_of_keys_default_to_those_of_queries(prefill_device):
    problem = make_prefill_problem(RaggedCase())
    q, k, v = prefill_arguments(problem, prefill_device)
    ends = torch.from_numpy(cumulative(problem.case.seq_lens)).to(prefill_device)
    expected = prefill_attention(q, k, v, cu_seqlens_q=ends)
    assert torch.equal(prefill_attention(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends.clone()), expected)


def test_output_is_written_in_place_and_returned(prefill_device):
    problem = make_prefill_problem(RaggedCase())
    arguments, given = prefill_arguments(problem, prefill_device), prefill_keywords(problem, prefill_device)
    out = torch.full_like(arguments[0], float("nan"))
    assert prefill_attention(*arguments, out=out, **given) is out
    assert torch.equal(out, prefill_attention(*arguments, **given))


def test_output_and_lse_have_the_promised_shape_and_dtype(prefill_device):
    problem = make_prefill_problem(RaggedCase(q_dtype="bfloat16"))
    out, lse = prefill_tensors(problem, prefill_device)
    assert out.shape == problem.q.shape and out.dtype == torch.bfloat16
    assert lse.shape == problem.q.shape[:2] and lse.dtype == torch.float32
