"""Windows, first keys, ALiBi, soft cap and sinks: each alone, against the reference and against its own definition."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import oracle
import pytest
from bridge import check, decode_arrays, kernel_tolerance
from cases import Case, make_problem, with_large_k_scales
from comparison import assert_close, assert_close_absolute

import pyquantattn

FORMATS = ["fp16", "int8", "fp8_e4m3"]
LONG = (130, 3, 0, 65)


def one_hot_values(problem):
    """V of key j is the unit vector e_(j mod D), so the output lists the keys that were seen."""
    shape = problem.v_codes.shape
    table = problem.page_table
    values = np.zeros(shape)
    for b, length in enumerate(problem.case.seq_lens):
        for j in range(length):
            page = b if table is None else table[b, j // shape[1]]
            values[page, j % shape[1], :, j % shape[3]] = 1
    fmt = oracle.split_pair(problem.case.kv_format)[1]
    problem.v_codes = oracle.codecs.encode(values, fmt)
    if fmt.has_scale:
        problem.v_scale = np.ones((shape[2],), np.float32)
    return problem


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 64, 129, 130, 131, 10**6])
@pytest.mark.parametrize("num_q_tokens", [1, 4])
def test_e2_sliding_window(num_q_tokens, window, kv_format, device):
    """E2: every window round tile, page and length boundaries."""
    case = Case(kv_format=kv_format, seq_lens=LONG, sliding_window=window, num_q_tokens=num_q_tokens)
    check(make_problem(case), device)


@pytest.mark.parametrize("window", [1, 2, 7, 16, 33])
def test_e2_one_hot_values_show_exactly_which_keys_were_seen(window, device):
    """E2: with V one-hot, the nonzero outputs are the visible keys and nothing else."""
    n = 3
    case = Case(kv_format="fp16", seq_lens=(40, 61, 17), sliding_window=window, num_q_tokens=n, q_dtype="float32")
    out, _ = decode_arrays(one_hot_values(make_problem(case)), device)
    for b, length in enumerate(case.seq_lens):
        for i in range(n):
            position = length - n + i
            seen = {j for j in range(length) if j <= position and position - j < window}
            for h in range(case.num_q_heads):
                assert set(np.flatnonzero(out[b, i, h])) == seen


def test_e2_window_of_one_returns_the_last_value(device):
    """E2: W = 1 sees only itself."""
    problem = make_problem(Case(kv_format="fp16", sliding_window=1, q_dtype="float32", seq_lens=(37, 5, 130)))
    out, lse = decode_arrays(problem, device)
    for b, length in enumerate(problem.seq_lens):
        page = problem.page_table[b, (length - 1) // 16]
        last = oracle.dequantize(problem.v_codes[page, (length - 1) % 16], oracle.FORMATS["fp16"])
        assert_close(out[b, 0], last.repeat(2, axis=0), relative=1e-6)
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("seed", range(4))
def test_first_visible_key(kv_format, seed, device):
    check(make_problem(Case(kv_format=kv_format, seq_lens=LONG, has_starts=True, num_q_tokens=2, seed=seed)), device)


def test_first_visible_key_past_the_end_sees_nothing(device):
    problem = make_problem(Case())
    problem.seq_starts = np.array([37, 5, 2**31 - 1, 0], np.int32)
    out, lse = decode_arrays(problem, device)
    assert (out[:3] == 0).all() and (lse[:3] == -np.inf).all() and np.isfinite(lse[3]).all()


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("alibi", ["heads", "rows"])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_e4_alibi(group, alibi, kv_format, device):
    """E4: positions are j - p, slopes per head or per sequence and head."""
    case = Case(kv_format=kv_format, seq_lens=LONG, alibi=alibi, group=group, num_q_tokens=3)
    check(make_problem(case), device)


def test_e4_slopes_of_the_paper():
    """E4: head counts that are not powers of two."""
    for n in [*range(1, 130), 1000]:
        slopes = np.asarray(pyquantattn.get_alibi_slopes(n), np.float64)
        np.testing.assert_allclose(slopes, oracle.get_alibi_slopes(n), rtol=1e-6)


def test_e4_a_rank_passes_the_slice_of_its_own_heads(device):
    """E4: a call with half of the heads equals half of the call with all of them."""
    problem = make_problem(Case(num_kv_heads=6, group=2, alibi="heads", seq_lens=LONG))
    out, lse = decode_arrays(problem, device)
    half = replace(
        problem,
        case=replace(problem.case, num_kv_heads=3),
        q=problem.q[:, :, 6:],
        k_codes=problem.k_codes[:, :, 3:],
        v_codes=problem.v_codes[:, :, 3:],
        k_scale=problem.k_scale[:, :, 3:],
        v_scale=problem.v_scale[:, :, 3:],
        alibi_slopes=problem.alibi_slopes[6:],
    )
    half_out, half_lse = decode_arrays(half, device)
    assert_close(half_out, out[:, :, 6:], relative=1e-3)
    assert_close_absolute(half_lse, lse[:, :, 6:], tolerance=1e-3, what="lse")


def test_e4_bias_is_zero_at_the_query_itself(device):
    """E4: slope * (j - p), neither slope * j nor off by one: where the query is the only key, the bias vanishes."""
    problem = make_problem(Case(seq_lens=(1, 40, 17), alibi="heads"))
    problem.seq_starts = problem.seq_lens - 1
    plain = replace(problem, alibi_slopes=None)
    for biased, unbiased in zip(decode_arrays(problem, device), decode_arrays(plain, device), strict=True):
        np.testing.assert_array_equal(biased, unbiased)


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("cap", [1.0, 5.0, 30.0])
def test_e6_soft_cap(cap, kv_format, device):
    """E6: cap * tanh(s / cap) of the scaled score."""
    check(make_problem(Case(kv_format=kv_format, seq_lens=LONG, logits_soft_cap=cap, sm_scale=0.7)), device)


def test_e6_caps_differ_by_what_the_reference_says(device):
    """E6: an ignored cap would make these equal."""
    results = []
    for cap in (1.0, 30.0, None):
        problem = make_problem(Case(seq_lens=(130, 65, 40), logits_soft_cap=cap, sm_scale=1.0))
        results.append((decode_arrays(problem, device)[1], problem.expected()[1]))
    for (lse_a, expected_a), (lse_b, expected_b) in pairwise(results):
        assert np.abs(expected_a - expected_b).max() > 0.05
        assert_close_absolute(lse_a - lse_b, expected_a - expected_b, tolerance=5e-3, what="difference of lse")


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("num_splits", [None, 1, 2, 5, 32])
@pytest.mark.parametrize("sink", [-10.0, 0.0, 10.0])
def test_e5_a_sink_counts_once_whatever_the_splits(sink, num_splits, kv_format, device):
    """E5: neither dropped nor counted once per split; the LSE includes it."""
    problem = make_problem(Case(kv_format=kv_format, seq_lens=LONG, has_sinks=True))
    problem.sinks[:] = sink + 0.25 * np.arange(len(problem.sinks))
    check(problem, device, num_splits=num_splits)


def test_e5_a_sink_alone_gives_zero_and_its_own_lse(device):
    problem = make_problem(Case(seq_lens=(0, 0, 4), has_sinks=True))
    out, lse = decode_arrays(problem, device)
    assert (out[:2] == 0).all()
    np.testing.assert_array_equal(lse[:2, 0], np.broadcast_to(problem.sinks, (2, 4)))


@pytest.mark.parametrize("scales", ["head", "token_head"])
@pytest.mark.parametrize("kv_format", ["int8", "fp8_e4m3", "fp8_e5m2"])
def test_d7_scales_fold_on_the_right_side_of_cap_window_and_alibi(kv_format, scales, device):
    """D7: k_scale 7 with a cap of 30, a window and ALiBi."""
    case = Case(
        kv_format=kv_format, scales=scales, seq_lens=LONG, logits_soft_cap=30.0, sliding_window=50, alibi="heads"
    )
    check(with_large_k_scales(make_problem(case)), device)


def aim_at_one_key(problem, length_of_query):
    """Points every query at one key of its sequence, which then wins by far. Returns the V rows of the winners."""
    k_format, v_format = oracle.split_pair(problem.case.kv_format)
    with np.errstate(invalid="ignore"):
        keys = oracle.dequantize(problem.k_codes, k_format, problem.k_scale)
        values = oracle.dequantize(problem.v_codes, v_format, problem.v_scale)
    winners = np.zeros_like(problem.q)
    for b, length in enumerate(problem.seq_lens):
        for h in range(problem.case.num_q_heads):
            j = (7 * h + 5 * b) % length
            place = problem.page_table[b, j // 16], j % 16, h // problem.case.group
            key, winners[b, 0, h] = keys[place], values[place]
            problem.q[b, 0, h] = np.float32(length_of_query * key / np.linalg.norm(key))
    return winners


@pytest.mark.parametrize("length_of_query", [50.0, 3000.0])
@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e4m3", "fp8_e5m2"])
def test_d10_large_logits_pick_one_row(kv_format, length_of_query, device):
    """D10: scores in the thousands: the winner's V alone, and its score as the LSE. A score is as exact as the query
    that the kernel multiplies: float32; on a CPU, for 8-bit caches, steps of 1/32767 of its largest element, which is
    4e-5 of the score of a Gaussian key; float16 in tensor cores."""
    problem = make_problem(Case(kv_format=kv_format, seq_lens=(40, 65, 9), sm_scale=20.0, q_dtype="float32"))
    winners = aim_at_one_key(problem, length_of_query)
    expected_out, expected_lse = problem.expected()
    np.testing.assert_array_equal(expected_out, winners, "a near tie would prove nothing")
    out, lse = decode_arrays(problem, device)
    assert_close(out, winners, relative=kernel_tolerance(kv_format, device) / 10)
    score_error = 2.0**-11 if device != "cpu" else 1e-6 if kv_format == "fp16" else 4e-5
    assert_close_absolute(lse, expected_lse, tolerance=score_error * expected_lse.max(), what="lse")


@pytest.mark.parametrize("num_splits", [1, 5])
@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e5m2"])
def test_a_nan_shows_in_output_and_lse_of_its_row_alone(kv_format, num_splits, device):
    """A result that passed for one without keys (LSE -inf) would vanish in `merge_states`."""
    problem = make_problem(Case(kv_format=kv_format, seq_lens=LONG))
    out, lse = decode_arrays(problem, device, num_splits=num_splits)
    problem.q[0, 0, 1, 5] = np.nan
    spoiled_out, spoiled_lse = decode_arrays(problem, device, num_splits=num_splits)
    out[0, 0, 1], lse[0, 0, 1] = np.nan, np.nan
    np.testing.assert_array_equal(spoiled_out, out)
    np.testing.assert_array_equal(spoiled_lse, lse)


def test_a_scale_of_zero_or_below_is_a_scale_like_any_other(device):
    for sm_scale in (0.0, -0.3):
        check(make_problem(Case(sm_scale=sm_scale)), device)


def test_zero_query_gives_the_mean_of_visible_values(device):
    """A7: lengths that are no multiple of a tile, uniform weights."""
    problem = make_problem(Case(kv_format="int8", seq_lens=(1, 7, 33, 65, 127)))
    problem.q[:] = 0
    check(problem, device)
    _, lse = decode_arrays(problem, device)
    np.testing.assert_allclose(lse[:, 0, 0], np.log(problem.seq_lens), atol=1e-5)


def test_a_window_beyond_every_length_changes_no_bit(device):
    problem = make_problem(Case(seq_lens=LONG))
    plain, _ = decode_arrays(problem, device)
    wide, _ = decode_arrays(problem, device, sliding_window=2**31 - 1)
    np.testing.assert_array_equal(plain, wide)
