"""Where numbers get extreme in a hybrid batch: scales beside a soft cap, large logits, parts without any key."""

from dataclasses import replace

import numpy as np
import pytest
from bridge import OUTPUT_ROUNDING, kernel_tolerance
from cases import round_to, with_large_k_scales
from comparison import assert_close, assert_close_absolute
from ragged import RaggedCase, arrays, check_hybrid, hybrid_tensors, make_hybrid_problem, rows_of

MIXED = RaggedCase(seq_lens=(130, 3, 0, 65, 20), q_lens=(130, 1, 0, 40, 20))


@pytest.mark.parametrize("scales", ["head", "token_head"])
@pytest.mark.parametrize("kv_format", ["int8", "fp8_e4m3", "fp8_e5m2"])
def test_d7_scales_fold_on_the_right_side_of_cap_window_and_alibi(kv_format, scales, hybrid_device):
    """D7: k_scale 7 with a cap of 30, a window and ALiBi."""
    case = replace(MIXED, kv_format=kv_format, scales=scales, logits_soft_cap=30.0, sliding_window=50, alibi="heads")
    check_hybrid(with_large_k_scales(make_hybrid_problem(case)), hybrid_device)


def aim_every_query_at_one_key(problem, length_of_query):
    """One key of its sequence then wins by far. Returns the V rows of the winners."""
    keys, values = problem.dequantized()
    winners = np.zeros_like(problem.q)
    for b, rows in enumerate(rows_of(problem.case)):
        for t in range(rows.start, rows.stop):
            for h in range(problem.case.num_q_heads):
                j = (7 * h + 5 * t + 3 * b) % problem.case.seq_lens[b]
                place = problem.page_table[b, j // 16], j % 16, h // problem.case.group
                key, winners[t, h] = keys[place], values[place]
                problem.q[t, h] = round_to(length_of_query * key / np.linalg.norm(key), problem.case.q_dtype)
    return winners


@pytest.mark.parametrize("length_of_query", [50.0, 3000.0])
@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e4m3", "fp8_e5m2"])
def test_d10_large_logits_pick_one_row(kv_format, length_of_query, hybrid_device):
    """D10: scores in the thousands, of many query tokens and of one: the winner's V alone, and its score as the LSE.
    On a CPU queries over 8-bit caches are steps of 1/32767 of their largest element; tensor cores truncate sums."""
    case = RaggedCase(kv_format=kv_format, seq_lens=(40, 65, 9), q_lens=(40, 17, 1), sm_scale=20.0, causal=False)
    problem = make_hybrid_problem(case)
    winners = aim_every_query_at_one_key(problem, length_of_query)
    expected_out, expected_lse = problem.expected()
    np.testing.assert_array_equal(expected_out, winners, "a near tie would prove nothing")
    out, lse = arrays(hybrid_tensors(problem, hybrid_device))
    assert_close(out, winners, relative=kernel_tolerance(kv_format, hybrid_device), rounding=OUTPUT_ROUNDING["float16"])
    assert_close_absolute(lse, expected_lse, tolerance=2.0**-13 * expected_lse.max(), what="lse")


@pytest.mark.parametrize("num_splits", [None, 2, 7, 64])
@pytest.mark.parametrize("window", [1, 3, 17])
def test_b3_windows_that_leave_most_splits_empty(window, num_splits, hybrid_device):
    """B3: of one query token, a few and many."""
    case = RaggedCase(seq_lens=(700, 65, 0, 130), q_lens=(1, 40, 0, 3), sliding_window=window, has_sinks=True)
    check_hybrid(make_hybrid_problem(case), hybrid_device, num_splits=num_splits)
