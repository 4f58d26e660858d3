"""A value that is not finite shows in every row that sees its key and in no other; the log-sum-exp knows nothing of it.

Tiles that some rows see only in part are where kernels take such values out: what they took out has to show.
"""

from dataclasses import replace

import numpy as np
import pytest
from bridge import decode_arrays
from cases import Case, make_problem
from ragged import (
    RaggedCase,
    arrays,
    hybrid_tensors,
    make_hybrid_problem,
    make_prefill_problem,
    prefill_tensors,
    rows_of,
)
from test_memory import assert_equal_results

NAN_CODES = {"int8": 17, "fp8_e4m3": 0x7F, "fp8_e5m2": 0x7E, "fp16": 0x7E00, "bf16": 0x7FC0}
FORMATS = list(NAN_CODES)


def with_nan_values(problem, sequence, key):
    """All of V at one key of a contiguous cache: NaN codes, or, where the format has none, a NaN scale."""
    spoiled = replace(problem, v_codes=problem.v_codes.copy())
    spoiled.v_codes[sequence, key] = NAN_CODES[problem.case.kv_format]
    if problem.v_scale is not None:
        spoiled.v_scale = problem.v_scale.copy()
        spoiled.v_scale[sequence, key] = np.nan
    return spoiled


def assert_shows_in(rows, result, clean):
    """In all channels of these rows of `out` alone."""
    sees = np.zeros(len(clean[0]), bool)
    sees[rows] = True
    assert sees.any() and not sees.all()
    assert np.isnan(result[0][sees]).all()
    assert_equal_results([x[~sees] for x in result], [x[~sees] for x in clean])
    np.testing.assert_array_equal(result[1], clean[1])


@pytest.mark.parametrize("key", [65, 67, 69])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("q_dtype", ["float16", "float32"])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_of_few_query_tokens(kv_format, q_dtype, group, key, device):
    case = Case(kv_format=kv_format, q_dtype=q_dtype, group=group, seq_lens=(70, 33), num_q_tokens=5, page_size=None)
    problem = make_problem(case)
    clean, result = (decode_arrays(p, device) for p in (problem, with_nan_values(problem, 0, key)))
    one_row_per_token = [[x.reshape(10, *x.shape[2:]) for x in pair] for pair in (result, clean)]
    assert_shows_in(range(key - 65, 5), *one_row_per_token)


@pytest.mark.parametrize("key", [3, 63, 64, 139])
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("num_queries", [140, 33])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_of_many_query_tokens_over_a_cache(kv_format, num_queries, head_dim, key, hybrid_device):
    lens, queries = (40, 140, 5), (40, num_queries, 1)
    case = RaggedCase(kv_format=kv_format, head_dim=head_dim, seq_lens=lens, q_lens=queries, page_size=None)
    problem = make_hybrid_problem(case)
    clean, result = (arrays(hybrid_tensors(p, hybrid_device)) for p in (problem, with_nan_values(problem, 1, key)))
    rows = rows_of(case)[1]
    assert_shows_in(range(max(rows.start, rows.stop - (140 - key)), rows.stop), result, clean)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("key", [3, 63, 64, 139])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_of_many_query_tokens_over_fresh_values(dtype, key, window, prefill_device):
    case = RaggedCase(seq_lens=(40, 140, 5), q_dtype=dtype, sliding_window=window)
    problem = make_prefill_problem(case)
    spoiled = replace(problem, v=problem.v.copy())
    spoiled.v[40 + key] = np.nan
    clean, result = (arrays(prefill_tensors(p, prefill_device)) for p in (problem, spoiled))
    end = 140 if window is None else min(140, key + window)
    assert_shows_in(range(40 + key, 40 + end), result, clean)
