"""torch integration: opcheck, torch.compile, eager overhead, autograd modes."""

import time

import pytest
import torch
from bridge import keywords, make_cache, query_tensor
from cases import Case, make_problem
from ragged import (
    RaggedCase,
    hybrid_tensors,
    make_hybrid_problem,
    make_prefill_problem,
    prefill_arguments,
    prefill_keywords,
    prefill_tensors,
)

import pyquantattn
from pyquantattn import KVCache, decode_attention, hybrid_attention, ops, prefill_attention

CASE = Case(seq_lens=(37, 0, 130, 5), alibi="heads", has_sinks=True, key_offset=3.0)
RAGGED = RaggedCase(seq_lens=(37, 0, 130, 5), q_lens=(37, 0, 1, 20), alibi="heads", has_sinks=True, key_offset=3.0)


def operator_arguments(device):
    """Arguments of the operators that every backend has."""
    problem = make_problem(CASE)
    q, cache, given = query_tensor(problem, device), make_cache(problem, device), keywords(problem, device)
    tensors = (cache.k, cache.v, cache.k_scale, cache.v_scale, cache.layout, cache.k_offset)
    rows = torch.randn(2, 3, 2, 64, device=device)
    slots = torch.tensor([1, -1, 4], device=device)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=device)
    numbers = (None, given["alibi_slopes"], None, None, given["sinks"], None, False)
    codes, scale = pyquantattn.quantize_kv(rows[0], "int8")
    states = torch.randn(3, 4, 2, 64, device=device), torch.randn(3, 4, 2, device=device)
    return {
        "append_kv": (*tensors, rows[0], rows[1], slots),
        "decode_attention": (q, *tensors, out, lse, given["seq_lens"], given["page_table"], None, *numbers),
        "quantize_kv": (rows[0], codes, scale, cache.k_offset),
        "dequantize_kv": (codes, scale, cache.k_offset, torch.empty(rows[0].shape, device=device)),
        "merge_states": tuple(x[i] for i in (0, 1, 2) for x in states),
    }


def prefill_operator_arguments(device):
    problem = make_prefill_problem(RAGGED)
    (q, k, v), given = prefill_arguments(problem, device), prefill_keywords(problem, device)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=device)
    numbers = (None, True, None, given["alibi_slopes"], None, None, given["sinks"])
    return q, k, v, out, lse, given["cu_seqlens_q"], given["cu_seqlens_k"], *numbers


def hybrid_operator_arguments(device):
    problem = make_hybrid_problem(RAGGED)
    q, cache, given = query_tensor(problem, device), make_cache(problem, device), keywords(problem, device)
    tensors = (cache.k, cache.v, cache.k_scale, cache.v_scale, cache.layout, cache.k_offset)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=device)
    numbers = (None, True, None, given["alibi_slopes"], None, None, given["sinks"], None, False)
    return q, *tensors, out, lse, given["cu_seqlens_q"], given["seq_lens"], given["page_table"], *numbers


@pytest.mark.parametrize("name", ["append_kv", "decode_attention", "quantize_kv", "dequantize_kv", "merge_states"])
def test_opcheck(name, device):
    torch.library.opcheck(getattr(ops, name), operator_arguments(device)[name])


def test_opcheck_of_prefill(prefill_device):
    torch.library.opcheck(ops.prefill_attention, prefill_operator_arguments(prefill_device))


def test_opcheck_of_hybrid(hybrid_device):
    torch.library.opcheck(ops.hybrid_attention, hybrid_operator_arguments(hybrid_device))


def step(cache, q, k, v, slots, seq_lens, page_table):
    """One decoding step of a layer: append, attend, and some work before and after that a compiler may fuse."""
    cache.append(k * 1.0, v * 1.0, slots)
    out, lse = decode_attention(q * 1.0, cache, seq_lens=seq_lens, page_table=page_table, return_lse=True)
    return out + 1, lse * 2


def run_steps(function, device, kv_format, layout="NHD"):
    """Eight steps from an empty cache; returns every result and the final cache."""
    torch.manual_seed(0)
    offset = 9 * torch.randn(2, 64, device=device)
    cache = KVCache.allocate(6, 4, 2, 64, kv_format=kv_format, device=device, layout=layout, k_offset=offset)
    page_table = torch.tensor([[1, 2], [3, 4], [5, 0]], dtype=torch.int32, device=device)
    results = []
    for t in range(8):
        q, k, v = (torch.randn(3, h, 64, device=device) for h in (4, 2, 2))
        slots = page_table[:, t // 4].long() * 4 + t % 4
        seq_lens = torch.full((3,), t + 1, dtype=torch.int32, device=device)
        results += function(cache, q, k, v, slots, seq_lens, page_table)
    return results, cache


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("kv_format", ["int8", "fp16", "fp8_e4m3", "fp16/int8"])
def test_compiled_steps_equal_eager_ones(kv_format, layout, device):
    """fullgraph=True over append and decode: the mutation of the cache is seen, in order, and without a graph break."""
    eager, eager_cache = run_steps(step, device, kv_format, layout)
    torch._dynamo.reset()
    compiled, cache = run_steps(torch.compile(step, fullgraph=True), device, kv_format, layout)
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(cache.k.view(torch.uint8), eager_cache.k.view(torch.uint8))
    assert torch.equal(cache.v.view(torch.uint8), eager_cache.v.view(torch.uint8))


def chunk_step(cache, qkv, slots, ends, seq_lens, page_table):
    """One layer's step over a ragged batch: q, k and v are slices of a fused projection, as in a model."""
    q, k, v = (qkv * 1.0).split((4, 2, 2), dim=1)
    exact, exact_lse = prefill_attention(q, k, v, cu_seqlens_q=ends, return_lse=True)
    cache.append(k, v, slots)
    out, lse = hybrid_attention(
        q, cache, cu_seqlens_q=ends, seq_lens=seq_lens, page_table=page_table, return_lse=True, batch_invariant=True
    )
    return exact * 2, exact_lse, out + 1, lse * 2


def run_chunks(function, device, kv_format):
    """A batch that prefills, then chunks of it that decode and prefill. Returns every result and the final cache."""
    torch.manual_seed(0)
    cache = KVCache.allocate(12, 8, 2, 64, kv_format=kv_format, device=device)
    table = torch.randperm(12, dtype=torch.int32).view(3, 4).to(device)
    done, results = torch.zeros(3, dtype=torch.int64), []
    for counts in ([20, 1, 5], [1, 17, 1], [1, 1, 3], [0, 2, 1]):
        parts = [torch.arange(d, d + n) for d, n in zip(done.tolist(), counts, strict=True)]
        slots = torch.cat([table[b, t // 8].long() * 8 + (t % 8).to(device) for b, t in enumerate(parts)])
        done += torch.tensor(counts)
        ends = torch.tensor([0, *counts]).cumsum(0).to(torch.int32).to(device)
        qkv = torch.randn(sum(counts), 8, 64, device=device)
        results += function(cache, qkv, slots, ends, done.to(torch.int32).to(device), table)
    return results, cache


@pytest.mark.parametrize("kv_format", ["int8", "fp16", "fp8_e4m3"])
def test_compiled_chunks_equal_eager_ones(kv_format, hybrid_device):
    """fullgraph=True over prefill, append and hybrid, with another number of tokens at each step."""
    eager, eager_cache = run_chunks(chunk_step, hybrid_device, kv_format)
    torch._dynamo.reset()
    compiled, cache = run_chunks(torch.compile(chunk_step, fullgraph=True), hybrid_device, kv_format)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    assert torch.equal(cache.k.view(torch.uint8), eager_cache.k.view(torch.uint8))


def test_compiled_codec_and_merge(device):
    def function(x, out, lse):
        codes, scale = pyquantattn.quantize_kv(x, "fp8_e4m3")
        return (pyquantattn.dequantize_kv(codes, scale), *pyquantattn.merge_states(out, lse, out + 1, lse))

    arguments = (torch.randn(5, 2, 64), torch.randn(3, 4, 64), torch.randn(3, 4))
    arguments = tuple(x.to(device) for x in arguments)
    torch._dynamo.reset()
    for a, b in zip(function(*arguments), torch.compile(function, fullgraph=True)(*arguments), strict=True):
        assert torch.equal(a, b)


def test_compiled_graph_copies_no_cache(device):
    """A functionalised mutation that copies the cache would double its memory traffic: the same storage is written."""
    cache = KVCache.allocate(4, 4, 2, 64, device=device)
    pointers = [t.data_ptr() for t in (cache.k, cache.v, cache.k_scale, cache.v_scale)]
    append = torch.compile(lambda k, slots: cache.append(k, k, slots), fullgraph=True)
    append(torch.ones(2, 2, 64, device=device), torch.tensor([3, 9], device=device))
    assert [t.data_ptr() for t in (cache.k, cache.v, cache.k_scale, cache.v_scale)] == pointers
    assert cache.k[0, 3].min() == 127 and cache.k[2, 1].min() == 127 and cache.k[0, 2].max() == 0


def test_gradients_are_refused_and_inference_mode_works(device):
    problem = make_problem(CASE)
    q, cache, given = query_tensor(problem, device), make_cache(problem, device), keywords(problem, device)
    expected = decode_attention(q, cache, **given)
    with pytest.raises(ValueError, match=r"^decode_attention: .*grad"):
        decode_attention(q.clone().requires_grad_(), cache, **given)
    with torch.no_grad():
        assert torch.equal(decode_attention(q.clone().requires_grad_(), cache, **given), expected)
    with torch.inference_mode():
        assert torch.equal(decode_attention(q, cache, **given), expected)


def test_ragged_calls_refuse_gradients_and_work_in_inference_mode(hybrid_device):
    q, k, v = torch.randn(3, 9, 2, 64, device=hybrid_device)
    ends = torch.tensor([0, 9], dtype=torch.int32, device=hybrid_device)
    cache = KVCache.allocate(1, 16, 2, 64, device=hybrid_device)
    cache.append(k, v, torch.arange(9, device=hybrid_device))
    calls = {
        "prefill_attention": lambda q: prefill_attention(q, k, v, cu_seqlens_q=ends),
        "hybrid_attention": lambda q: hybrid_attention(q, cache, cu_seqlens_q=ends, seq_lens=ends[1:]),
    }
    for who, call in calls.items():
        expected = call(q)
        with pytest.raises(ValueError, match=rf"^{who}: q must not require a gradient"):
            call(q.clone().requires_grad_())
        with torch.no_grad():
            assert torch.equal(call(q.clone().requires_grad_()), expected)
        with torch.inference_mode():
            assert torch.equal(call(q), expected)


def fewest_seconds(function, repeats=200):
    """The fastest of many calls: other work on the machine only adds time, so it does not decide."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def test_eager_overhead_of_a_call_is_bounded():
    """At most 10 us on one thread. A slower machine is given twelve times what the output tensor costs, which every
    call makes, and a busy one several attempts."""
    cache = KVCache.allocate(1, 8, 1, 64)
    q, lens = torch.zeros(1, 1, 64), torch.zeros(1, dtype=torch.int32)
    calls = {
        "decode_attention": lambda: decode_attention(q, cache, seq_lens=lens),
        "hybrid_attention": lambda: hybrid_attention(q, cache, cu_seqlens_q=ends, seq_lens=lens),
        "prefill_attention": lambda: prefill_attention(q, q, q, cu_seqlens_q=ends),
    }
    ends = torch.tensor([0, 1], dtype=torch.int32)
    pyquantattn.set_num_threads(1)
    try:
        for _ in range(20):
            yardstick = fewest_seconds(lambda: torch.empty(1, 1, 64))
            slow = {name: t for name in calls if (t := fewest_seconds(calls[name])) >= max(10e-6, 12 * yardstick)}
            if not slow:
                return
            time.sleep(0.1)
    finally:
        pyquantattn.set_num_threads(None)
    pytest.fail(f"{slow} s, torch.empty takes {1e6 * yardstick:.2f} us")


def test_tensors_are_read_alike_without_the_exchange_api():
    """A torch without the DLPack C exchange API is served through attributes."""
    from pyquantattn import _core

    problem = make_problem(CASE)
    q, given = query_tensor(problem, "cpu"), keywords(problem, "cpu")
    expected = decode_attention(q, make_cache(problem, "cpu"), return_lse=True, **given)
    _core.set_exchange_api_enabled(False)
    try:
        assert not _core.uses_exchange_api(q)
        result = decode_attention(q, make_cache(problem, "cpu"), return_lse=True, **given)
        with pytest.raises(ValueError, match="seq_lens must be int32, got int64"):
            decode_attention(q, make_cache(problem, "cpu"), **(given | {"seq_lens": given["seq_lens"].long()}))
        ragged = make_hybrid_problem(RAGGED), make_prefill_problem(RAGGED)
        by_attributes = *hybrid_tensors(ragged[0], "cpu"), *prefill_tensors(ragged[1], "cpu")
    finally:
        _core.set_exchange_api_enabled(True)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    by_exchange = *hybrid_tensors(ragged[0], "cpu"), *prefill_tensors(ragged[1], "cpu")
    assert all(torch.equal(a, b) for a, b in zip(by_attributes, by_exchange, strict=True))
