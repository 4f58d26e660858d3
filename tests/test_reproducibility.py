"""The same bits from run to run; in batch-invariant mode whatever else the batch holds and however many threads run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bridge import decode_tensors, keywords, make_cache, query_tensor
from cases import Case, make_problem
from ragged import (
    RaggedCase,
    hybrid_tensors,
    make_hybrid_problem,
    make_prefill_problem,
    prefill_arguments,
    prefill_keywords,
    prefill_tensors,
    rows_of,
)

import pyquantattn

FORMATS = ["fp16", "int8", "fp8_e4m3"]
RAGGED = Case(seq_lens=(2100, 37, 0, 513, 1290), group=4)
# Prompts of one tile and of many, a few queries over many keys, and the reverse.
PROMPTS = RaggedCase(
    seq_lens=(300, 37, 0, 130, 65, 2100), q_lens=(300, 12, 0, 150, 1, 20), group=4, alibi="rows", has_starts=True
)
HYBRID = RaggedCase(seq_lens=(2100, 37, 0, 513, 1290), q_lens=(1, 37, 0, 64, 3), group=4, alibi="rows", has_starts=True)
DTYPES = ["float32", "float16", "bfloat16"]


def same_bits(first, second):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, second, strict=True))


@pytest.fixture
def set_num_threads():
    yield pyquantattn.set_num_threads
    pyquantattn.set_num_threads(None)


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("num_splits", [None, 5])
def test_the_same_call_gives_the_same_bits(num_splits, kv_format, device):
    problem = make_problem(replace(RAGGED, kv_format=kv_format))
    q, cache, given = query_tensor(problem, device), make_cache(problem, device), keywords(problem, device)
    first = pyquantattn.decode_attention(q, cache, return_lse=True, num_splits=num_splits, **given)
    for _ in range(20):
        assert same_bits(pyquantattn.decode_attention(q, cache, return_lse=True, num_splits=num_splits, **given), first)


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("num_q_tokens", [1, 3])
def test_f5_a_row_does_not_depend_on_the_rest_of_the_batch(num_q_tokens, kv_format, device):
    """F5: each row alone, on other pages, beside others, and under a longer maximum length: the same bits."""
    problem = make_problem(replace(RAGGED, kv_format=kv_format, num_q_tokens=num_q_tokens))
    q, cache, given = query_tensor(problem, device), make_cache(problem, device), keywords(problem, device)
    whole = pyquantattn.decode_attention(q, cache, return_lse=True, batch_invariant=True, **given)
    for b in range(len(q)):
        one = {name: t[b : b + 1] for name, t in given.items()}
        alone = pyquantattn.decode_attention(q[b : b + 1], cache, return_lse=True, batch_invariant=True, **one)
        assert same_bits(alone, [t[b : b + 1] for t in whole])
    order = torch.tensor([3, 0, 4, 4, 1], device=device)
    mixed = {name: t[order].contiguous() for name, t in given.items()}
    shuffled = pyquantattn.decode_attention(q[order], cache, return_lse=True, batch_invariant=True, **mixed)
    assert same_bits(shuffled, [t[order] for t in whole])


@pytest.mark.parametrize("kv_format", FORMATS)
def test_f5_page_placement_does_not_matter(kv_format, device):
    """F5: the same tokens on other pages of the pool."""
    problem = make_problem(replace(RAGGED, kv_format=kv_format))
    whole = decode_tensors(problem, device, batch_invariant=True)
    permutation = np.random.default_rng(5).permutation(len(problem.k_codes))
    moved = replace(problem, page_table=problem.page_table.copy())
    for name in ("k_codes", "v_codes", "k_scale", "v_scale"):
        tensor = getattr(problem, name)
        if tensor is not None:
            placed = np.empty_like(tensor)
            placed[permutation] = tensor
            setattr(moved, name, placed)
    for b, length in enumerate(problem.seq_lens):
        live = -(-int(length) // 16)
        moved.page_table[b, :live] = permutation[problem.page_table[b, :live]]
    assert same_bits(decode_tensors(moved, device, batch_invariant=True), whole)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_batch_invariant_results_do_not_depend_on_the_thread_count(kv_format, set_num_threads):
    problem = make_problem(replace(RAGGED, kv_format=kv_format))
    results = []
    for num_threads in (1, 2, 3, 7):
        set_num_threads(num_threads)
        results.append(decode_tensors(problem, "cpu", batch_invariant=True))
    assert all(same_bits(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("num_splits", [1, 6])
def test_forced_splits_do_not_depend_on_the_thread_count(num_splits, kv_format, set_num_threads):
    """A forced number of splits fixes the order of additions as well."""
    problem = make_problem(replace(RAGGED, kv_format=kv_format))
    results = []
    for num_threads in (1, 2, 5):
        set_num_threads(num_threads)
        results.append(decode_tensors(problem, "cpu", num_splits=num_splits))
    assert all(same_bits(result, results[0]) for result in results[1:])


def test_quantisation_does_not_depend_on_the_thread_count(set_num_threads):
    x = torch.randn(5000, 4, 64)
    results = []
    for num_threads in (1, 4):
        set_num_threads(num_threads)
        results.append(pyquantattn.quantize_kv(x, "int8"))
    assert same_bits(*results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_prefill_gives_the_same_bits(dtype, prefill_device):
    problem = make_prefill_problem(replace(PROMPTS, q_dtype=dtype))
    first = prefill_tensors(problem, prefill_device)
    assert all(same_bits(prefill_tensors(problem, prefill_device), first) for _ in range(10))


@pytest.mark.parametrize("kv_format", FORMATS)
def test_the_same_hybrid_batch_gives_the_same_bits(kv_format, hybrid_device):
    problem = make_hybrid_problem(replace(HYBRID, kv_format=kv_format))
    first = hybrid_tensors(problem, hybrid_device)
    assert all(same_bits(hybrid_tensors(problem, hybrid_device), first) for _ in range(10))


@pytest.mark.parametrize("dtype", DTYPES)
def test_f5_a_prompt_does_not_depend_on_the_rest_of_the_batch(dtype, prefill_device):
    """F5: each prompt alone: the same bits, without any option."""
    problem = make_prefill_problem(replace(PROMPTS, q_dtype=dtype))
    (q, k, v), given = prefill_arguments(problem, prefill_device), prefill_keywords(problem, prefill_device)
    whole = prefill_tensors(problem, prefill_device)
    keys = rows_of(replace(PROMPTS, q_lens=None))
    for b, (rows, owned) in enumerate(zip(rows_of(PROMPTS), keys, strict=True)):
        one = {name: given[name][b : b + 1] for name in ("seq_starts", "alibi_slopes")}
        for name, part in (("cu_seqlens_q", rows), ("cu_seqlens_k", owned)):
            one[name] = torch.tensor([0, part.stop - part.start], dtype=torch.int32, device=prefill_device)
        alone = pyquantattn.prefill_attention(q[rows], k[owned], v[owned], return_lse=True, **one)
        assert same_bits(alone, [t[rows] for t in whole])


@pytest.mark.parametrize("kv_format", FORMATS)
def test_f5_a_row_does_not_depend_on_the_rest_of_the_hybrid_batch(kv_format, hybrid_device):
    """F5: each sequence alone and in another order: the same bits."""
    problem = make_hybrid_problem(replace(HYBRID, kv_format=kv_format))
    q, cache, given = (make(problem, hybrid_device) for make in (query_tensor, make_cache, keywords))
    whole = hybrid_tensors(problem, hybrid_device, batch_invariant=True)
    per_sequence = ("seq_lens", "page_table", "seq_starts", "alibi_slopes")
    rows = rows_of(HYBRID)
    for order in ([0], [1], [3], [4], [4, 2, 3, 0, 1], [1, 4]):
        taken = torch.cat([torch.arange(rows[b].start, rows[b].stop) for b in order]).to(hybrid_device)
        some = given | {name: given[name][order].contiguous() for name in per_sequence}
        ends = np.cumsum([0, *(rows[b].stop - rows[b].start for b in order)])
        some["cu_seqlens_q"] = torch.tensor(ends, dtype=torch.int32, device=hybrid_device)
        result = pyquantattn.hybrid_attention(q[taken], cache, return_lse=True, batch_invariant=True, **some)
        assert same_bits(result, [t[taken] for t in whole]), order


@pytest.mark.parametrize("kv_format", FORMATS)
def test_ragged_results_do_not_depend_on_the_thread_count(kv_format, set_num_threads):
    """Prefill always; hybrid in batch-invariant mode and with forced splits."""
    prompts = make_prefill_problem(PROMPTS)
    hybrid = make_hybrid_problem(replace(HYBRID, kv_format=kv_format))
    results = []
    for num_threads in (1, 2, 3, 7):
        set_num_threads(num_threads)
        results.append(
            [
                *prefill_tensors(prompts, "cpu"),
                *hybrid_tensors(hybrid, "cpu", batch_invariant=True),
                *hybrid_tensors(hybrid, "cpu", num_splits=3),
            ]
        )
    assert all(same_bits(result, results[0]) for result in results[1:])
