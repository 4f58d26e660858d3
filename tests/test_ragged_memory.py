"""Memory that must not matter to prefill_attention and hybrid_attention, and memory that they must not touch.

Problems are poisoned where no query token looks (cases.py, ragged.py); tests change the poison and compare bits."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from bridge import keywords, make_cache, query_tensor
from cases import live_slots
from comparison import assert_same_bits
from ragged import (
    RaggedCase,
    arrays,
    check_hybrid,
    hybrid_tensors,
    make_hybrid_problem,
    make_prefill_problem,
    prefill_arguments,
    prefill_keywords,
    prefill_tensors,
    rows_of,
)

import pyquantattn
from pyquantattn import KVCache, hybrid_attention, prefill_attention

FORMATS = ["fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2"]
DTYPES = ["float32", "float16", "bfloat16"]
NAN_CODES = {"int8": 127, "fp8_e4m3": 0x7F, "fp8_e5m2": 0x7E, "fp16": 0x7E00, "bf16": 0x7FC0}
TAILS = RaggedCase(seq_lens=(1, 15, 17, 63, 65, 127, 130, 0), q_lens=(1, 15, 2, 20, 65, 1, 130, 0))
# What hides keys from every query token of a sequence.
HIDING = [{"sliding_window": 9}, {"has_starts": True}, {"sliding_window": 20, "has_starts": True, "causal": False}]


def assert_equal_results(first, second):
    for a, b, name in zip(first, second, ("out", "lse"), strict=True):
        assert_same_bits(a, b, name)


def with_zeros_instead_of_poison(problem):
    num_pages, page_size = problem.k_codes.shape[:2]
    live = live_slots(problem.case, problem.page_table, num_pages, page_size, problem.seq_starts)
    changed = {}
    for side in ("k", "v"):
        changed[f"{side}_codes"] = np.where(live[..., None, None], getattr(problem, f"{side}_codes"), 0)
        scale = getattr(problem, f"{side}_scale")
        if scale is not None and scale.ndim == 3:
            changed[f"{side}_scale"] = np.where(live[..., None], scale, 0.0)
    return replace(problem, **changed)


@pytest.mark.parametrize("page_size", [1, 16, 64, None])
@pytest.mark.parametrize("scales", ["token_head", "head"])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_a1_unused_slots_never_matter(kv_format, scales, page_size, hybrid_device):
    """A1: NaN codes and NaN or infinite scales in every unused slot: right, and bit-equal to zeros there."""
    scales = "token_head" if kv_format in ("fp16", "bf16") else scales
    problem = make_hybrid_problem(replace(TAILS, kv_format=kv_format, scales=scales, page_size=page_size))
    check_hybrid(problem, hybrid_device)
    clean = with_zeros_instead_of_poison(problem)
    assert_equal_results(arrays(hybrid_tensors(problem, hybrid_device)), arrays(hybrid_tensors(clean, hybrid_device)))


@pytest.mark.parametrize("hiding", HIDING, ids=str)
@pytest.mark.parametrize("kv_format", FORMATS)
def test_a1_cached_keys_that_nobody_sees_never_matter(kv_format, hiding, hybrid_device):
    """A1: before the first visible key and outside every window."""
    problem = make_hybrid_problem(replace(TAILS, kv_format=kv_format, **hiding))
    check_hybrid(problem, hybrid_device)
    clean = with_zeros_instead_of_poison(problem)
    assert_equal_results(arrays(hybrid_tensors(problem, hybrid_device)), arrays(hybrid_tensors(clean, hybrid_device)))


@pytest.mark.parametrize("hiding", HIDING, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a1_fresh_keys_that_nobody_sees_never_matter(dtype, hiding, prefill_device):
    problem = make_prefill_problem(replace(TAILS, q_dtype=dtype, **hiding))
    assert np.isnan(problem.k).any(), "nothing is hidden"
    clean = replace(problem, k=np.nan_to_num(problem.k), v=np.nan_to_num(problem.v))
    assert_equal_results(
        arrays(prefill_tensors(problem, prefill_device)), arrays(prefill_tensors(clean, prefill_device))
    )


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("first_bad", [1, 30, 63, 64, 69])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a1_a_fresh_key_spoils_no_row_that_stands_before_it(dtype, first_bad, poison, prefill_device):
    """Keys from `first_bad` on hold NaN: rows before keep their bits, later ones show it. 0 * NaN would be NaN."""
    problem = make_prefill_problem(RaggedCase(seq_lens=(70, 70, 5), q_dtype=dtype))
    clean = arrays(prefill_tensors(problem, prefill_device))
    spoiled = replace(problem, k=problem.k.copy(), v=problem.v.copy())
    spoiled.v[70 + first_bad : 140] = poison
    spoiled.k[70 + first_bad : 140] = poison
    result = arrays(prefill_tensors(spoiled, prefill_device))
    safe = [*range(70 + first_bad), *range(140, 145)]
    assert_equal_results([x[safe] for x in result], [x[safe] for x in clean])
    assert not np.isfinite(result[0][70 + first_bad : 140]).any()


@pytest.mark.parametrize("num_queries", [70, 33, 17, 5])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_a1_a_cached_key_spoils_no_row_that_stands_before_it(kv_format, num_queries, hybrid_device):
    """The same over a cache, by NaN codes and NaN scales, in chunks that either kernel takes."""
    case = RaggedCase(kv_format=kv_format, seq_lens=(70, 70, 5), q_lens=(70, num_queries, 1), page_size=None)
    problem = make_hybrid_problem(case)
    clean = arrays(hybrid_tensors(problem, hybrid_device))
    spoiled = replace(problem, k_codes=problem.k_codes.copy(), v_codes=problem.v_codes.copy())
    spoiled.k_codes[1, 67:70] = spoiled.v_codes[1, 67:70] = NAN_CODES[kv_format]
    if problem.k_scale is not None:
        spoiled.k_scale, spoiled.v_scale = problem.k_scale.copy(), problem.v_scale.copy()
        spoiled.k_scale[1, 67:70] = spoiled.v_scale[1, 67:70] = np.nan
    result = arrays(hybrid_tensors(spoiled, hybrid_device))
    end = 70 + num_queries
    safe = [*range(end - 3), end]
    assert_equal_results([x[safe] for x in result], [x[safe] for x in clean])
    assert np.isnan(result[0][end - 3 : end]).all() and np.isnan(result[1][end - 3 : end]).all()


@pytest.mark.parametrize("kv_format", FORMATS)
def test_a3_another_sequence_full_of_nan_never_matters(kv_format, hybrid_device):
    """A3: one prompt, its pages and their scales hold NaN; the others keep their bits."""
    case = RaggedCase(kv_format=kv_format, seq_lens=(33, 40, 170, 9), q_lens=(33, 40, 1, 9))
    problem = make_hybrid_problem(case)
    before = arrays(hybrid_tensors(problem, hybrid_device))
    pages = problem.page_table[1, :3]
    spoiled = replace(problem, k_codes=problem.k_codes.copy(), v_codes=problem.v_codes.copy())
    spoiled.k_codes[pages] = spoiled.v_codes[pages] = NAN_CODES[kv_format]
    if problem.k_scale is not None:
        spoiled.k_scale, spoiled.v_scale = problem.k_scale.copy(), problem.v_scale.copy()
        spoiled.k_scale[pages] = spoiled.v_scale[pages] = np.nan
    after = arrays(hybrid_tensors(spoiled, hybrid_device))
    rows = rows_of(case)[1]
    others = np.r_[0 : rows.start, rows.stop : len(problem.q)]
    assert_equal_results([x[others] for x in after], [x[others] for x in before])
    assert np.isnan(after[0][rows]).all(), "the spoiled sequence itself shows its NaN"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a3_a_nan_in_a_query_spoils_its_row_alone(dtype, prefill_device):
    problem = make_prefill_problem(RaggedCase(q_dtype=dtype))
    out, lse = arrays(prefill_tensors(problem, prefill_device))
    problem.q[20, 1, 5] = np.nan
    spoiled_out, spoiled_lse = arrays(prefill_tensors(problem, prefill_device))
    out[20, 1], lse[20, 1] = np.nan, np.nan
    np.testing.assert_array_equal(spoiled_out, out)
    np.testing.assert_array_equal(spoiled_lse, lse)


@pytest.mark.parametrize("garbage", [-1, -(2**31), 2**31 - 1, 10**9, 0])
def test_a5_page_ids_past_the_last_live_page_never_matter(garbage, hybrid_device):
    problem = make_hybrid_problem(replace(TAILS, sliding_window=40))
    expected = arrays(hybrid_tensors(problem, hybrid_device))
    for b, length in enumerate(problem.seq_lens):
        problem.page_table[b, -(-length // 16) :] = garbage
    assert_equal_results(arrays(hybrid_tensors(problem, hybrid_device)), expected)


@pytest.mark.parametrize("options", [{}, {"num_splits": 7}], ids=str)
def test_a10_results_do_not_depend_on_leftovers_of_other_calls(options, hybrid_device):
    """A10: the same calls before and after ones that fill workspaces with other numbers and with NaN."""
    cached = make_hybrid_problem(RaggedCase(seq_lens=(300, 5, 129), q_lens=(100, 1, 17)))
    before = arrays(hybrid_tensors(cached, hybrid_device, **options))
    poison = make_hybrid_problem(
        RaggedCase(kv_format="fp16", seq_lens=(513, 200), q_lens=(200, 3), num_kv_heads=8, head_dim=256)
    )
    poison.v_codes[:] = poison.k_codes[:] = 0x7E00
    hybrid_tensors(poison, hybrid_device, **options)
    assert_equal_results(arrays(hybrid_tensors(cached, hybrid_device, **options)), before)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a10_prefill_does_not_depend_on_leftovers(dtype, prefill_device):
    problem = make_prefill_problem(RaggedCase())
    before = arrays(prefill_tensors(problem, prefill_device))
    poison = make_prefill_problem(RaggedCase(seq_lens=(300, 70), num_kv_heads=4, head_dim=256, q_dtype=dtype))
    poison.k[:] = poison.v[:] = poison.q[:] = np.nan
    prefill_tensors(poison, prefill_device)
    assert_equal_results(arrays(prefill_tensors(problem, prefill_device)), before)


def guarded_output(q):
    """A strided output inside a buffer of guard values."""
    guard = torch.full((q.shape[0] + 2, q.shape[1] + 2, q.shape[2] + 16), 7.0, dtype=q.dtype, device=q.device)
    return guard, guard[1:-1, 1:-1, 8:-8]


def assert_empty_rows(case, out, lse):
    """B1: 0 and -inf where nothing is visible, finite elsewhere."""
    for length, rows in zip(case.seq_lens, rows_of(case), strict=True):
        num_queries = rows.stop - rows.start
        blind = rows.stop if length == 0 else rows.start + (max(0, num_queries - length) if case.causal else 0)
        assert (out[rows.start : blind] == 0).all() and (lse[rows.start : blind] == -torch.inf).all()
        assert torch.isfinite(out[blind : rows.stop]).all() and torch.isfinite(lse[blind : rows.stop]).all()


EMPTY = [
    RaggedCase(seq_lens=(0, 0, 0)),
    RaggedCase(seq_lens=(0, 0, 0), q_lens=(3, 1, 70)),
    RaggedCase(seq_lens=(9, 40, 70), q_lens=(0, 0, 0)),
    RaggedCase(seq_lens=(0, 17, 0, 130, 0), q_lens=(1, 17, 0, 150, 20)),
    RaggedCase(seq_lens=(0, 17, 0, 130, 0), q_lens=(1, 30, 0, 150, 20), causal=False),
    RaggedCase(seq_lens=(5,), q_lens=(0,)),
]


@pytest.mark.parametrize("case", EMPTY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_b1_empty_prompts_give_zero_and_bytes_around_the_output_stay(dtype, case, prefill_device):
    problem = make_prefill_problem(replace(case, q_dtype=dtype))
    arguments = prefill_arguments(problem, prefill_device)
    guard, out = guarded_output(arguments[0])
    _, lse = prefill_attention(*arguments, out=out, return_lse=True, **prefill_keywords(problem, prefill_device))
    assert_empty_rows(case, out, lse)
    out.fill_(7.0)
    assert (guard == 7.0).all(), "bytes around the output were written"


@pytest.mark.parametrize("case", EMPTY, ids=str)
@pytest.mark.parametrize("kv_format", FORMATS)
def test_b1_empty_cached_sequences_give_zero_and_bytes_around_the_output_stay(kv_format, case, hybrid_device):
    problem = make_hybrid_problem(replace(case, kv_format=kv_format, q_dtype="float32"))
    q, cache = query_tensor(problem, hybrid_device), make_cache(problem, hybrid_device)
    guard, out = guarded_output(q)
    _, lse = hybrid_attention(q, cache, out=out, return_lse=True, **keywords(problem, hybrid_device))
    assert_empty_rows(case, out, lse)
    out.fill_(7.0)
    assert (guard == 7.0).all(), "bytes around the output were written"


def test_b1_a_sink_alone_gives_zero_and_its_own_lse(prefill_device):
    problem = make_prefill_problem(RaggedCase(seq_lens=(0, 4), q_lens=(3, 6), has_sinks=True))
    out, lse = arrays(prefill_tensors(problem, prefill_device))
    blind = [0, 1, 2, 3, 4]
    assert (out[blind] == 0).all()
    np.testing.assert_array_equal(lse[blind], np.broadcast_to(problem.sinks, (5, 4)))


def test_b1_an_empty_batch_is_fine(prefill_device):
    q, k = (torch.empty((0, h, 64), dtype=torch.float16, device=prefill_device) for h in (4, 2))
    none = torch.zeros(1, dtype=torch.int32, device=prefill_device)
    out, lse = prefill_attention(q, k, k, cu_seqlens_q=none, return_lse=True)
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


def test_b1_an_empty_hybrid_batch_is_fine(hybrid_device):
    cache = KVCache.allocate(2, 16, 2, 64, device=hybrid_device)
    out, lse = hybrid_attention(
        torch.empty((0, 4, 64), device=hybrid_device),
        cache,
        cu_seqlens_q=torch.zeros(1, dtype=torch.int32, device=hybrid_device),
        seq_lens=torch.empty(0, dtype=torch.int32, device=hybrid_device),
        page_table=torch.empty((0, 3), dtype=torch.int32, device=hybrid_device),
        return_lse=True,
    )
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


FULL = {"alibi": "rows", "has_sinks": True, "has_starts": True}


def test_inputs_of_prefill_are_never_written(prefill_device):
    problem = make_prefill_problem(RaggedCase(q_lens=(30, 2, 9, 1, 70), **FULL))
    tensors, given = prefill_arguments(problem, prefill_device), prefill_keywords(problem, prefill_device)
    unchanged([*tensors, *given.values()], lambda: prefill_attention(*tensors, **given))


def test_inputs_of_hybrid_are_never_written(hybrid_device):
    problem = make_hybrid_problem(replace(TAILS, kv_format="fp8_e4m3", **FULL))
    q, cache, given = (make(problem, hybrid_device) for make in (query_tensor, make_cache, keywords))
    tensors = [q, cache.k, cache.v, cache.k_scale, cache.v_scale, *given.values()]
    unchanged(tensors, lambda: hybrid_attention(q, cache, **given))


def unchanged(tensors, call):
    tensors = [t for t in tensors if torch.is_tensor(t)]
    before = [t.view(torch.uint8).clone() for t in tensors]
    call()
    assert all(torch.equal(t.view(torch.uint8), copy) for t, copy in zip(tensors, before, strict=True))


GROWTH = """
import resource, torch, pyquantattn
cache = pyquantattn.KVCache.allocate(1, 65536, 8, 128, kv_format="{kv_format}", k_scale={scale}, v_scale={scale})
for codes in (cache.k, cache.v):
    codes.view(torch.uint8).fill_(1)
q, ends = torch.randn(64, 8, 128), torch.tensor([0, 64], dtype=torch.int32)
def peak(length):
    lens = torch.tensor([length], dtype=torch.int32)
    pyquantattn.hybrid_attention(q, cache, cu_seqlens_q=ends, seq_lens=lens)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
first = peak(64)
print(peak(65536) - first)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB on Linux")
@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e4m3"])
def test_prefill_over_a_cache_makes_no_copy_of_it(kv_format):
    """The process grows by less than a sixteenth of the cache, which a dequantised copy exceeds 32 times."""
    code = GROWTH.format(kv_format=kv_format, scale=None if kv_format == "fp16" else 0.5)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 8192, f"grew by {run.stdout.strip()} KiB"


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB on Linux")
def test_prefill_stores_no_score_matrix():
    """2,048 tokens of 8 heads: a matrix of scores would take 128 MiB."""
    code = (
        "import resource, torch, pyquantattn\n"
        "pyquantattn.set_num_threads(2)\n"
        "def peak(n):\n"
        "    q, ends = torch.randn(n, 8, 64), torch.tensor([0, n], dtype=torch.int32)\n"
        "    pyquantattn.prefill_attention(q, q, q, cu_seqlens_q=ends)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "first = peak(64)\n"
        "print(peak(2048) - first)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 32 << 10, f"grew by {run.stdout.strip()} KiB"


def test_a_cpu_has_every_operation():
    """The tests of prefill and hybrid run somewhere."""
    assert pyquantattn.supports(None, 64, operation="prefill_attention")
    assert pyquantattn.supports("int8", 64, operation="hybrid_attention")
