"""Memory that must not matter, and memory that must not be touched.

Every problem is poisoned where nobody may look (see cases.py); these tests change the poison and compare bits.
"""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from bridge import check, decode_arrays, decode_tensors, keywords, make_cache, query_tensor
from cases import Case, live_slots, make_problem
from comparison import assert_same_bits

import pyquantattn

FORMATS = ["fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2"]
TAILS = (1, 15, 17, 63, 65, 127, 130, 0)


def is_live(problem):
    num_pages, page_size = problem.k_codes.shape[:2]
    return live_slots(problem.case, problem.page_table, num_pages, page_size, problem.seq_starts)


def with_zeros_instead_of_poison(problem, sides=("k", "v")):
    live = is_live(problem)
    changed = {}
    for side in sides:
        changed[f"{side}_codes"] = np.where(live[..., None, None], getattr(problem, f"{side}_codes"), 0)
        scale = getattr(problem, f"{side}_scale")
        if scale is not None and scale.ndim == 3:
            changed[f"{side}_scale"] = np.where(live[..., None], scale, 0.0)
    return replace(problem, **changed)


def assert_equal_results(first, second):
    for a, b, name in zip(first, second, ("out", "lse"), strict=True):
        assert_same_bits(a, b, name)


@pytest.mark.parametrize("page_size", [16, 64, None])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("scales", ["token_head", "head"])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_a1_unused_slots_never_matter(kv_format, scales, group, page_size, device):
    """A1: NaN codes and NaN or infinite scales in every unused slot: finite, right, and bit-equal to zeros there."""
    if scales == "head" and kv_format in ("fp16", "bf16"):
        scales = "token_head"
    case = Case(kv_format=kv_format, scales=scales, group=group, page_size=page_size, seq_lens=TAILS)
    problem = make_problem(case)
    check(problem, device)
    assert_equal_results(decode_arrays(problem, device), decode_arrays(with_zeros_instead_of_poison(problem), device))


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_a2_either_tail_alone(kv_format, side, device):
    """A2: the K tail alone, and the V tail alone."""
    problem = make_problem(Case(kv_format=kv_format, seq_lens=TAILS))
    clean = with_zeros_instead_of_poison(problem)
    other = "v" if side == "k" else "k"
    half_clean = with_zeros_instead_of_poison(problem, sides=(other,))
    assert_equal_results(decode_arrays(half_clean, device), decode_arrays(clean, device))


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("window,has_starts", [(9, False), (None, True), (20, True)])
def test_a1_keys_that_nobody_sees_never_matter(window, has_starts, kv_format, device):
    """A1: keys before the first visible one and outside every window hold poison, too."""
    case = Case(kv_format=kv_format, seq_lens=TAILS, sliding_window=window, has_starts=has_starts, num_q_tokens=2)
    problem = make_problem(case)
    check(problem, device)
    assert_equal_results(decode_arrays(problem, device), decode_arrays(with_zeros_instead_of_poison(problem), device))


@pytest.mark.parametrize("kv_format", FORMATS)
def test_a3_another_sequence_full_of_nan_never_matters(kv_format, device):
    """A3: sequence 1 and the reserved page 0 hold NaN; the others keep their bits."""
    problem = make_problem(Case(kv_format=kv_format, seq_lens=(33, 40, 17), page_size=16))
    before = decode_arrays(problem, device)
    pages = problem.page_table[1, :3]
    nan = np.array({"int8": -128, "fp8_e4m3": 0x7F, "fp8_e5m2": 0x7E, "fp16": 0x7E00, "bf16": 0x7FC0}[kv_format])
    spoiled = replace(problem, k_codes=problem.k_codes.copy(), v_codes=problem.v_codes.copy())
    spoiled.k_codes[pages] = spoiled.v_codes[pages] = nan.astype(problem.k_codes.dtype)
    if problem.k_scale is not None:
        spoiled.k_scale, spoiled.v_scale = problem.k_scale.copy(), problem.v_scale.copy()
        spoiled.k_scale[pages] = spoiled.v_scale[pages] = np.nan
    after = decode_arrays(spoiled, device)
    others = [0, 2]
    assert_equal_results([x[others] for x in after], [x[others] for x in before])
    assert np.isnan(after[0][1]).any(), "the spoiled sequence itself shows its NaN"


@pytest.mark.parametrize("garbage", [-1, -(2**31), 2**31 - 1, 10**9, 0])
def test_a5_page_ids_past_the_last_live_page_never_matter(garbage, device):
    """A5: padding of any kind in the page table."""
    problem = make_problem(Case(seq_lens=(33, 0, 130, 16)))
    expected = decode_arrays(problem, device)
    for b, length in enumerate(problem.seq_lens):
        problem.page_table[b, -(-length // 16) :] = garbage
    assert_equal_results(decode_arrays(problem, device), expected)


@pytest.mark.parametrize("bad", [-1, 10**9, 2**31 - 1])
def test_a5_a_bad_live_page_id_is_an_error_on_a_cpu(bad):
    """A5: documented behaviour: checked on a CPU, where it costs nothing."""
    problem = make_problem(Case(seq_lens=(33, 0, 130, 16)))
    problem.page_table[2, 8] = bad
    with pytest.raises(ValueError, match=rf"page_table\[2, 8\] must be in \[0, \d+\), got {bad}"):
        decode_arrays(problem, "cpu")


@pytest.mark.parametrize("kv_format", ["fp16", "int8"])
@pytest.mark.parametrize("num_splits", [None, 7])
def test_a10_results_do_not_depend_on_leftovers_of_other_calls(num_splits, kv_format, device):
    """A10: the same call before and after calls that fill workspaces with other numbers and with NaN."""
    problem = make_problem(Case(kv_format=kv_format, seq_lens=(300, 5, 129)))
    before = decode_arrays(problem, device, num_splits=num_splits)
    poison = make_problem(Case(kv_format="fp16", seq_lens=(513, 200), num_kv_heads=8, head_dim=256))
    poison.v_codes[:] = 0x7E00
    poison.k_codes[:] = 0x7E00
    decode_arrays(poison, device, num_splits=num_splits or 9)
    assert_equal_results(decode_arrays(problem, device, num_splits=num_splits), before)


def guarded_output(q):
    """A strided output inside a buffer of guard values."""
    guard = torch.full((*q.shape[:-2], q.shape[-2] + 2, q.shape[-1] + 16), 7.0, dtype=q.dtype, device=q.device)
    return guard, guard[..., 1:-1, 8:-8]


@pytest.mark.parametrize("lens", [(0, 0, 0), (0, 17, 0, 130), (5,)], ids=str)
@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("num_q_tokens", [1, 4])
def test_b1_empty_sequences_give_zero_and_bytes_around_the_output_stay(num_q_tokens, kv_format, lens, device):
    """B1: out 0, LSE -inf, nothing written beside `out`."""
    problem = make_problem(Case(kv_format=kv_format, seq_lens=lens, num_q_tokens=num_q_tokens, q_dtype="float32"))
    q, cache = query_tensor(problem, device), make_cache(problem, device)
    guard, out = guarded_output(q)
    _, lse = pyquantattn.decode_attention(q, cache, out=out, return_lse=True, **keywords(problem, device))
    for b, length in enumerate(lens):
        if length == 0:
            assert (out[b] == 0).all() and (lse[b] == -torch.inf).all()
        else:
            assert torch.isfinite(out[b]).all()
    out.fill_(7.0)
    assert (guard == 7.0).all(), "bytes around the output were written"


def test_b1_an_empty_batch_is_fine(device):
    """B1: batch 0."""
    problem = make_problem(Case(seq_lens=(3, 4, 5)))
    cache = make_cache(problem, device)
    q = torch.empty((0, 4, 64), dtype=torch.float16, device=device)
    out, lse = pyquantattn.decode_attention(
        q,
        cache,
        seq_lens=torch.empty(0, dtype=torch.int32, device=device),
        page_table=torch.empty((0, 3), dtype=torch.int32, device=device),
        return_lse=True,
    )
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


def test_inputs_are_never_written(device):
    problem = make_problem(Case(kv_format="fp8_e4m3", alibi="rows", has_sinks=True, has_starts=True))
    q, cache = query_tensor(problem, device), make_cache(problem, device)
    given = keywords(problem, device)
    tensors = [q, cache.k, cache.v, cache.k_scale, cache.v_scale, *(t for t in given.values() if torch.is_tensor(t))]
    before = [t.view(torch.uint8).clone() for t in tensors]
    pyquantattn.decode_attention(q, cache, **given)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.view(torch.uint8), copy)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_nan_that_is_visible_shows(kv_format, device):
    """The poison tests mean something: NaN in a live key or value does reach the output."""
    if kv_format == "int8":
        pytest.skip("int8 has no NaN code; its scales are covered by test_a3")
    problem = make_problem(Case(kv_format=kv_format, seq_lens=(33, 40, 17)))
    nan = {"fp8_e4m3": 0x7F, "fp8_e5m2": 0x7E, "fp16": 0x7E00, "bf16": 0x7FC0}[kv_format]
    problem.v_codes[problem.page_table[0, 0], 3, 0, 5] = nan
    out, _ = decode_tensors(problem, device)
    assert out[0].isnan().any() and not out[1:].isnan().any()


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("q_dtype", ["float16", "float32"])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_a1_a_key_spoils_no_query_token_that_stands_before_it(kv_format, q_dtype, group, device):
    """A1: the last two keys hold NaN codes and NaN scales: only the query tokens that see them show it."""
    case = Case(kv_format=kv_format, q_dtype=q_dtype, group=group, seq_lens=(70, 33, 5), num_q_tokens=5, page_size=None)
    problem = make_problem(case)
    before = decode_arrays(problem, device)
    nan = np.array({"int8": -128, "fp8_e4m3": 0x7F, "fp8_e5m2": 0x7E, "fp16": 0x7E00, "bf16": 0x7FC0}[kv_format])
    spoiled = replace(problem, k_codes=problem.k_codes.copy(), v_codes=problem.v_codes.copy())
    spoiled.k_codes[0, 68:70] = spoiled.v_codes[0, 68:70] = nan.astype(problem.k_codes.dtype)
    if problem.k_scale is not None:
        spoiled.k_scale, spoiled.v_scale = problem.k_scale.copy(), problem.v_scale.copy()
        spoiled.k_scale[0, 68:70] = spoiled.v_scale[0, 68:70] = np.nan
    after = decode_arrays(spoiled, device)
    assert_equal_results([x[0, :3] for x in after], [x[0, :3] for x in before])
    assert_equal_results([x[1:] for x in after], [x[1:] for x in before])
    assert all(np.isnan(x[0, 3:]).all() for x in after)


def test_nan_in_a_value_shows_through_a_sink_that_takes_all_weight(device):
    """Its weight is zero, but it is seen."""
    problem = make_problem(Case(kv_format="fp16", seq_lens=(33, 40, 17), has_sinks=True))
    problem.v_codes[problem.page_table[0, 0], 3, 0, 5] = 0x7E00
    problem.sinks[:] = 1e4
    out, lse = decode_arrays(problem, device)
    expected = np.zeros_like(out)
    expected[0, 0, :2, 5] = np.nan
    np.testing.assert_array_equal(out, expected)
    assert (lse == 1e4).all()


GROWTH = """
import resource, torch, pyquantattn
cache = pyquantattn.KVCache.allocate(1, 65536, 8, 128, kv_format="{kv_format}", k_scale={scale}, v_scale={scale})
for codes in (cache.k, cache.v):
    codes.view(torch.uint8).fill_(1)
q = torch.randn(1, 64, 128)
def peak(length):
    pyquantattn.decode_attention(q, cache, seq_lens=torch.tensor([length], dtype=torch.int32))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
first = peak(1)
print(peak(65536) - first)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB on Linux")
@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e4m3"])
def test_decoding_makes_no_copy_of_the_cache(kv_format):
    """The process grows by less than a sixteenth of the cache, which a dequantised copy exceeds 32 times."""
    code = GROWTH.format(kv_format=kv_format, scale=None if kv_format == "fp16" else 0.5)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 8192, f"grew by {run.stdout.strip()} KiB"
