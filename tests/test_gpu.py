"""What only a GPU has: graphs, streams, several devices, unread device memory. Skipped with a reason elsewhere."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bridge import check, decode_tensors, keywords, make_cache, query_tensor
from cases import Case, make_problem
from test_torch import run_steps, step

import pyquantattn
from pyquantattn import KVCache, decode_attention

FORMATS = ["fp16", "int8", "fp8_e4m3", "fp8_e5m2"]
MAX_LENGTH = 65536


def long_cache(kv_format, device, max_length=MAX_LENGTH):
    """One sequence of random rows on shuffled pages, and its page table."""
    page_size = 64
    num_pages = max_length // page_size + 1
    cache = KVCache.allocate(num_pages, page_size, 2, 64, kv_format=kv_format, device=device)
    table = torch.randperm(num_pages - 1, device=device, dtype=torch.int32)[None] + 1
    positions = torch.arange(max_length, device=device)
    slots = table[0, positions // page_size].long() * page_size + positions % page_size
    rows = torch.randn(2, max_length, 2, 64, device=device)
    cache.append(rows[0], rows[1], slots)
    return cache, table


def int32(*values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("num_splits", [None, 7])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_f2_a_graph_captured_at_one_length_is_right_at_others(kv_format, batch_invariant, num_splits, cuda):
    """F2: captured at length 3, replayed at 1, 17, 8191 and 65536, with other queries."""
    if batch_invariant and num_splits:
        pytest.skip("the two exclude each other")
    cache, table = long_cache(kv_format, cuda)
    q, lens = torch.randn(1, 8, 64, device=cuda, dtype=torch.float16), int32(3, device=cuda)
    options = {"page_table": table, "return_lse": True, "num_splits": num_splits, "batch_invariant": batch_invariant}
    decode_attention(q, cache, seq_lens=lens, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode_attention(q, cache, seq_lens=lens, **options)
    for length in (1, 17, 8191, MAX_LENGTH, 0, 3):
        lens.fill_(length)
        q.copy_(torch.randn_like(q))
        graph.replay()
        expected, expected_lse = decode_attention(q, cache, seq_lens=lens, **options)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse), length


@pytest.mark.parametrize("kv_format", FORMATS)
def test_f2_a_graph_captured_for_equal_lengths_is_right_for_others(kv_format, cuda):
    """F2: equal lengths are cut in another way than unequal ones, and only the device knows which they are."""
    cache, table = long_cache(kv_format, cuda, max_length=4096)
    batch_size = 64
    q = torch.randn(batch_size, 8, 64, device=cuda, dtype=torch.float16)
    lens = torch.full((batch_size,), 1000, dtype=torch.int32, device=cuda)
    options = {"page_table": table.expand(batch_size, -1).contiguous(), "seq_lens": lens}
    decode_attention(q, cache, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, cache, **options)
    for length, step_between in ((1000, 0), (1, 61), (4096, 0), (4096, -65), (1000, 0)):
        lens.copy_(length + step_between * torch.arange(batch_size, device=cuda))
        graph.replay()
        expected = torch.cat(
            [
                decode_attention(q[b : b + 1], cache, page_table=table, seq_lens=lens[b : b + 1])
                for b in range(batch_size)
            ]
        )
        torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)


def test_f2_replays_see_new_scales_and_page_tables(cuda):
    """F2: scale values and page tables are read at replay, not at capture."""
    problem = make_problem(Case(scales="head", seq_lens=(40, 9, 130)))
    q, cache, given = query_tensor(problem, cuda), make_cache(problem, cuda), keywords(problem, cuda)
    decode_attention(q, cache, **given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, cache, **given)
    cache.k_scale.mul_(0.5)
    cache.v_scale.mul_(3)
    given["page_table"].copy_(given["page_table"].flip(0).clamp(0, cache.num_pages - 1))
    graph.replay()
    assert torch.equal(out, decode_attention(q, cache, **given))


def test_f2_append_and_decode_are_captured_together(cuda):
    cache = KVCache.allocate(8, 4, 2, 64, device=cuda)
    k, v, q = (torch.randn(1, h, 64, device=cuda) for h in (2, 2, 4))
    slot, lens = torch.zeros(1, dtype=torch.int64, device=cuda), int32(1, device=cuda)
    table = torch.arange(8, device=cuda, dtype=torch.int32)[None]

    def one_step():
        cache.append(k, v, slot)
        return decode_attention(q, cache, seq_lens=lens, page_table=table)

    one_step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = one_step()
    fresh = KVCache.allocate(8, 4, 2, 64, device=cuda)
    for t in range(20):
        k.normal_(), v.normal_(), q.normal_(), slot.fill_(t), lens.fill_(t + 1)
        graph.replay()
        fresh.append(k, v, slot)
        assert torch.equal(out, decode_attention(q, fresh, seq_lens=lens, page_table=table)), t


def test_f3_no_operation_waits_for_the_device(cuda):
    """F3: torch's synchronisation debug mode raises on any hidden wait."""
    problem = make_problem(Case(alibi="rows", has_sinks=True, has_starts=True))
    q, cache, given = query_tensor(problem, cuda), make_cache(problem, cuda), keywords(problem, cuda)
    rows, slots = torch.randn(3, 2, 64, device=cuda), torch.tensor([1, 2, -1], device=cuda)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = decode_attention(q, cache, return_lse=True, **given)
        cache.append(rows, rows, slots)
        codes, scale = pyquantattn.quantize_kv(rows, "int8")
        pyquantattn.dequantize_kv(codes, scale)
        pyquantattn.merge_states(out, lse, out, lse)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def behind_a_slow_producer(q, call):
    """`call` of a copy of q that is written late, on a side stream; the default stream would read it too early."""
    torch.cuda.synchronize()
    late = torch.zeros_like(q)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(q)
        result = call(late)
    stream.synchronize()
    return result


def test_f1_work_goes_to_the_current_stream(cuda):
    problem = make_problem(Case(seq_lens=(300, 40, 9)))
    q, cache, given = query_tensor(problem, cuda), make_cache(problem, cuda), keywords(problem, cuda)
    expected = decode_attention(q, cache, **given)
    assert torch.equal(behind_a_slow_producer(q, lambda late: decode_attention(late, cache, **given)), expected)


def test_f1_two_streams_at_once_do_not_share_scratch(cuda):
    """A10, F4: split results of calls that overlap in time."""
    problems = [make_problem(Case(seq_lens=(3000, 700, 9), seed=s)) for s in range(2)]
    calls = [(query_tensor(p, cuda), make_cache(p, cuda), keywords(p, cuda)) for p in problems]
    expected = [decode_attention(q, cache, num_splits=16, **given) for q, cache, given in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    results = [[], []]
    for _ in range(50):
        for i, (q, cache, given) in enumerate(calls):
            with torch.cuda.stream(streams[i]):
                results[i].append(decode_attention(q, cache, num_splits=16, **given))
    torch.cuda.synchronize()
    for i, outs in enumerate(results):
        assert all(torch.equal(out, expected[i]) for out in outs)


def test_f1_tensors_on_several_devices_are_refused(cuda):
    """F1: the query on the CPU, lengths on the CPU, and, with two GPUs, on the other one."""
    problem = make_problem(Case())
    q, cache, given = query_tensor(problem, cuda), make_cache(problem, cuda), keywords(problem, cuda)
    with pytest.raises(ValueError, match=r"^decode_attention: q must be on cuda:0 .*, got cpu"):
        decode_attention(q.cpu(), cache, **given)
    with pytest.raises(ValueError, match=r"^decode_attention: seq_lens must be on cuda:0 .*, got cpu"):
        decode_attention(q, cache, **(given | {"seq_lens": given["seq_lens"].cpu()}))
    with pytest.raises(ValueError, match=r"^append\w*: slot_mapping must be on cuda:0 .*, got cpu"):
        cache.append(torch.zeros(1, 2, 64, device=cuda), torch.zeros(1, 2, 64, device=cuda), torch.tensor([0]))


def test_f1_the_current_device_does_not_matter(cuda):
    """F1: tensors on cuda:1 with current device 0."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    problem = make_problem(Case(seq_lens=(300, 40, 9)))
    expected, _ = decode_tensors(problem, "cuda")
    other = "cuda:1"
    q, cache, given = query_tensor(problem, other), make_cache(problem, other), keywords(problem, other)
    assert torch.cuda.current_device() == 0
    out = decode_attention(q, cache, **given)
    assert out.device.index == 1 and torch.equal(out.cpu(), expected.cpu())
    with pytest.raises(ValueError, match=r"q must be on cuda:1 .*, got cuda:0"):
        decode_attention(q.to("cuda:0"), cache, **given)


@pytest.mark.parametrize("kv_format", ["int8", "fp16"])
def test_compiled_with_graphs_equals_eager(kv_format, cuda):
    """torch.compile(mode="reduce-overhead"): inductor's own CUDA graphs round append and decode."""
    eager, eager_cache = run_steps(step, cuda, kv_format)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    results, cache = run_steps(lambda *a: [t.clone() for t in compiled(*a)], cuda, kv_format)
    for a, b in zip(eager, results, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(cache.k.view(torch.uint8), eager_cache.k.view(torch.uint8))


@pytest.mark.parametrize("bad", [-1, 10**9, 2**31 - 1])
def test_a5_a_bad_live_page_id_is_not_dereferenced(bad, cuda):
    """A5: documented for CUDA: never read back, never dereferenced; other sequences keep their results."""
    problem = make_problem(Case(seq_lens=(33, 40, 130)))
    expected, _ = decode_tensors(problem, cuda)
    problem.page_table[1, 1] = bad
    out, _ = decode_tensors(problem, cuda)
    torch.cuda.synchronize()
    assert torch.equal(out[[0, 2]], expected[[0, 2]])


def test_a6_a_slot_outside_the_cache_is_skipped(cuda):
    """A6: documented for CUDA: its row is skipped, the others are written."""
    cache = KVCache.allocate(2, 4, 1, 64, device=cuda)
    rows = torch.ones(4, 1, 64, device=cuda)
    cache.append(rows, rows, torch.tensor([3, 8, -5, 2**60], device=cuda))
    codes = cache.k.flatten(0, 1)
    assert (codes[3] == 127).all() and codes.int().abs().sum() == 127 * 64


def test_a_length_beyond_the_table_counts_as_the_capacity(cuda):
    problem = make_problem(Case(seq_lens=(48, 48, 48), page_size=16))
    problem.page_table = np.ascontiguousarray(problem.page_table[:, :3])
    expected, _ = decode_tensors(problem, cuda)
    longer = replace(problem, seq_lens=problem.seq_lens + np.array([0, 7, 10**6], np.int32))
    out, _ = decode_tensors(longer, cuda)
    assert torch.equal(out[0], expected[0]) and torch.isfinite(out).all()


@pytest.mark.parametrize("return_lse", [False, True])
def test_f4_workspaces_of_large_batches(return_lse, cuda):
    """F4: 64 heads and a large batch, with and without LSE."""
    case = Case(seq_lens=tuple(7 * i % 90 for i in range(256)), num_kv_heads=8, group=8, head_dim=128)
    check(make_problem(case), cuda, **({} if return_lse else {"num_splits": 3}))


def test_cuda_and_cpu_write_the_same_cache_bytes(cuda):
    """The same bytes on every device, for every format and dtype."""
    for kv_format in ("fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = (torch.randn(300, 3, 72) * torch.logspace(-6, 4, 300)[:, None, None]).to(dtype)
            here, there = pyquantattn.quantize_kv(x, kv_format), pyquantattn.quantize_kv(x.to(cuda), kv_format)
            assert torch.equal(here[0].view(torch.uint8), there[0].cpu().view(torch.uint8)), (kv_format, dtype)
            assert here[1] is None or torch.equal(here[1], there[1].cpu())
