"""torch integration: opcheck, torch.compile, eager overhead, autograd modes."""

import time

import pytest
import torch
from bridge import keywords, make_cache, query_tensor
from cases import Case, make_problem

import pyquantattn
from pyquantattn import KVCache, decode_attention, ops

CASE = Case(seq_lens=(37, 0, 130, 5), alibi="heads", has_sinks=True)


def operator_arguments(device):
    """Arguments of every registered operator."""
    problem = make_problem(CASE)
    q, cache, given = query_tensor(problem, device), make_cache(problem, device), keywords(problem, device)
    tensors = (cache.k, cache.v, cache.k_scale, cache.v_scale, cache.layout)
    rows = torch.randn(2, 3, 2, 64, device=device)
    slots = torch.tensor([1, -1, 4], device=device)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=device)
    numbers = (None, given["alibi_slopes"], None, None, given["sinks"], None, False)
    codes, scale = pyquantattn.quantize_kv(rows[0], "int8")
    states = torch.randn(3, 4, 2, 64, device=device), torch.randn(3, 4, 2, device=device)
    return {
        "append_kv": (*tensors, rows[0], rows[1], slots),
        "decode_attention": (q, *tensors, out, lse, given["seq_lens"], given["page_table"], None, *numbers),
        "quantize_kv": (rows[0], codes, scale),
        "dequantize_kv": (codes, scale, torch.empty(rows[0].shape, device=device)),
        "merge_states": tuple(x[i] for i in (0, 1, 2) for x in states),
    }


@pytest.mark.parametrize("name", ["append_kv", "decode_attention", "quantize_kv", "dequantize_kv", "merge_states"])
def test_opcheck(name, device):
    torch.library.opcheck(getattr(ops, name), operator_arguments(device)[name])


def step(cache, q, k, v, slots, seq_lens, page_table):
    """One decoding step of a layer: append, attend, and some work before and after that a compiler may fuse."""
    cache.append(k * 1.0, v * 1.0, slots)
    out, lse = decode_attention(q * 1.0, cache, seq_lens=seq_lens, page_table=page_table, return_lse=True)
    return out + 1, lse * 2


def run_steps(function, device, kv_format, layout="NHD"):
    """Eight steps from an empty cache; returns every result and the final cache."""
    torch.manual_seed(0)
    cache = KVCache.allocate(6, 4, 2, 64, kv_format=kv_format, device=device, layout=layout)
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
    pyquantattn.set_num_threads(1)
    try:
        for _ in range(20):
            yardstick = fewest_seconds(lambda: torch.empty(1, 1, 64))
            call = fewest_seconds(lambda: decode_attention(q, cache, seq_lens=lens))
            if call < max(10e-6, 12 * yardstick):
                return
            time.sleep(0.1)
    finally:
        pyquantattn.set_num_threads(None)
    pytest.fail(f"{1e6 * call:.1f} us, torch.empty takes {1e6 * yardstick:.2f} us")


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
    finally:
        _core.set_exchange_api_enabled(True)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
