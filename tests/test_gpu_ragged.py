"""What only a GPU has, for prefill_attention and hybrid_attention: graphs, streams, hidden waits, old scratch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bridge import keywords, make_cache, query_tensor
from ragged import (
    RaggedCase,
    hybrid_tensors,
    make_hybrid_problem,
    make_prefill_problem,
    prefill_arguments,
    prefill_keywords,
    rows_of,
)
from test_gpu import behind_a_slow_producer

from pyquantattn import KVCache, decode_attention, force_kernel, hybrid_attention, prefill_attention, supports
from pyquantattn.runtime import prefill_variants

FORMATS = ["fp16", "int8", "fp8_e4m3"]
OPTIONS = [{}, {"num_splits": 7}, {"batch_invariant": True}]
TOKENS, BATCH, CAPACITY = 70, 4, 3000
# Query tokens of each sequence, and keys: captured with the first, replayed with all of them.
BATCHES = [
    ((1, 1, 1, 67), (5, 900, 33, 67)),
    ((70, 0, 0, 0), (70, 5, 0, 900)),
    ((0, 0, 0, 70), (0, 0, 0, 2999)),
    ((16, 17, 18, 19), (3000, 17, 1000, 19)),
    ((0, 3, 67, 0), (50, 2, 10, 0)),
]
mixed = pytest.mark.parametrize("q_dtype", [torch.float16, torch.float32], ids=str)


def filled_cache(kv_format, device, page_size=16):
    """Random rows in all pages, and a table that leads to each of them once."""
    num_pages = BATCH * -(-CAPACITY // page_size)
    cache = KVCache.allocate(num_pages, page_size, 2, 64, kv_format=kv_format, device=device)
    rows = torch.randn(2, num_pages * page_size, 2, 64, device=device)
    cache.append(rows[0], rows[1], torch.arange(num_pages * page_size, device=device))
    return cache, torch.randperm(num_pages, device=device, dtype=torch.int32).view(BATCH, -1)


def set_batch(ends, lens, batch):
    q_lens, k_lens = batch
    ends.copy_(torch.tensor([0, *q_lens]).cumsum(0).int())
    lens.copy_(torch.tensor(k_lens, dtype=torch.int32))


@mixed
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kv_format", FORMATS)
def test_f2_a_captured_hybrid_batch_is_right_for_others(kv_format, options, q_dtype, cuda):
    """F2: other lengths, other query tokens of each sequence, other page tables; each replay equals the eager call."""
    cache, table = filled_cache(kv_format, cuda)
    q = torch.randn(TOKENS, 8, 64, device=cuda).to(q_dtype)
    ends, lens = (torch.zeros(n, device=cuda, dtype=torch.int32) for n in (BATCH + 1, BATCH))
    set_batch(ends, lens, BATCHES[0])
    given = {"cu_seqlens_q": ends, "seq_lens": lens, "page_table": table, "return_lse": True, **options}
    hybrid_attention(q, cache, **given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = hybrid_attention(q, cache, **given)
    for batch in (*BATCHES, BATCHES[0]):
        set_batch(ends, lens, batch)
        q.copy_(torch.randn_like(q))
        table.copy_(table.view(-1)[torch.randperm(table.numel(), device=cuda)].view_as(table))
        graph.replay()
        expected, expected_lse = hybrid_attention(q, cache, **given)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse), batch
        assert torch.isfinite(out).all()


# Of sequences with one query token each: those that are equally long are cut otherwise.
SINGLE_TOKEN_BATCHES = [
    ((1, 1, 1, 1), (900, 900, 900, 900)),
    ((1, 1, 1, 1), (900, 905, 920, 33)),
    ((2, 0, 1, 1), (900, 900, 900, 900)),
    ((1, 1, 1, 1), (0, 0, 0, 0)),
    ((0, 4, 0, 0), (3000, 3000, 3000, 3000)),
    ((1, 1, 1, 1), (3000, 3000, 3000, 3000)),
]


@mixed
@pytest.mark.parametrize("captured", [0, 1, 4])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_f2_equal_lengths_come_and_go_in_a_captured_hybrid_batch(kv_format, captured, q_dtype, cuda):
    """F2: each replay equals the batch-invariant call, whose cut looks at nothing but a sequence's own length."""
    cache, table = filled_cache(kv_format, cuda)
    q = torch.randn(BATCH, 8, 64, device=cuda).to(q_dtype)
    ends, lens = (torch.zeros(n, device=cuda, dtype=torch.int32) for n in (BATCH + 1, BATCH))
    set_batch(ends, lens, SINGLE_TOKEN_BATCHES[captured])
    given = {"cu_seqlens_q": ends, "seq_lens": lens, "page_table": table}
    hybrid_attention(q, cache, **given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = hybrid_attention(q, cache, **given)
    for batch in (*SINGLE_TOKEN_BATCHES, SINGLE_TOKEN_BATCHES[0]):
        set_batch(ends, lens, batch)
        graph.replay()
        expected = hybrid_attention(q, cache, batch_invariant=True, **given)
        torch.testing.assert_close(
            out, expected, rtol=2e-3, atol=2e-3, msg=lambda text, batch=batch: f"{batch}: {text}"
        )


def test_f2_replays_of_a_hybrid_batch_see_new_scales(cuda):
    problem = make_hybrid_problem(RaggedCase(scales="head", seq_lens=(40, 9, 130), q_lens=(40, 1, 3)))
    q, cache, given = query_tensor(problem, cuda), make_cache(problem, cuda), keywords(problem, cuda)
    hybrid_attention(q, cache, **given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = hybrid_attention(q, cache, **given)
    cache.k_scale.mul_(0.5)
    cache.v_scale.mul_(3)
    graph.replay()
    assert torch.equal(out, hybrid_attention(q, cache, **given))


@pytest.mark.parametrize("q_dtype", ["float16", "float32"])
def test_f3_neither_operation_waits_for_the_device(q_dtype, cuda):
    """F3: torch's synchronisation debug mode raises on any hidden wait."""
    case = RaggedCase(q_dtype=q_dtype, q_lens=(30, 0, 2, 1, 70), alibi="rows", has_sinks=True, has_starts=True)
    problem, prompts = make_hybrid_problem(case), make_prefill_problem(case)
    q, cache, given = query_tensor(problem, cuda), make_cache(problem, cuda), keywords(problem, cuda)
    tensors, options = prefill_arguments(prompts, cuda), prefill_keywords(prompts, cuda)
    has_prefill = supports(None, 64, operation="prefill_attention", device=cuda) and q_dtype == "float16"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        hybrid_attention(q, cache, return_lse=True, **given)
        if has_prefill:
            prefill_attention(*tensors, return_lse=True, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=["hybrid_attention", "prefill_attention"])
def call_with(request, cuda):
    """(q, call): `call(q)` attends with other queries of the same batch, to fresh K and V on every kernel for them."""
    if request.param == "hybrid_attention":
        problem = make_hybrid_problem(RaggedCase(seq_lens=(300, 70, 9), q_lens=(1, 40, 9)))
        cache, given = make_cache(problem, cuda), keywords(problem, cuda)
        return query_tensor(problem, cuda), lambda q: [hybrid_attention(q, cache, **given)]
    problem = make_prefill_problem(RaggedCase(seq_lens=(300, 70, 9)))
    (q, k, v), given = prefill_arguments(problem, cuda), prefill_keywords(problem, cuda)
    kernels = [name for name in ("hopper", "tensor_cores") if name in prefill_variants()]

    def call(q):
        results = []
        for name in kernels:
            with force_kernel(name):
                results.append(prefill_attention(q, k, v, **given))
        return results

    return q, call


def test_f1_work_goes_to_the_current_stream(call_with):
    q, call = call_with
    expected = call(q)
    results = behind_a_slow_producer(q, call)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_f1_tensors_on_several_devices_are_refused(cuda):
    problem, prompts = make_hybrid_problem(RaggedCase()), make_prefill_problem(RaggedCase())
    q, cache, given = query_tensor(problem, cuda), make_cache(problem, cuda), keywords(problem, cuda)
    with pytest.raises(ValueError, match=r"^hybrid_attention: seq_lens must be on cuda:0 .*, got cpu"):
        hybrid_attention(q, cache, **(given | {"seq_lens": given["seq_lens"].cpu()}))
    (q, k, v), given = prefill_arguments(prompts, cuda), prefill_keywords(prompts, cuda)
    with pytest.raises(ValueError, match=r"^prefill_attention: v must be on cuda:0 .*, got cpu"):
        prefill_attention(q, k, v.cpu(), **given)


def test_f1_the_current_device_does_not_matter(cuda):
    """F1: hybrid batches, and prompts on every kernel for them, on cuda:1 with current device 0."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    problem, prompts = make_hybrid_problem(RaggedCase()), make_prefill_problem(RaggedCase())

    def results_on(device):
        q, cache, given = query_tensor(problem, device), make_cache(problem, device), keywords(problem, device)
        outs = [hybrid_attention(q, cache, **given)]
        tensors, given = prefill_arguments(prompts, device), prefill_keywords(prompts, device)
        for name in {"hopper", "tensor_cores"} & set(prefill_variants()):
            with force_kernel(name):
                outs.append(prefill_attention(*tensors, **given))
        return [out.cpu() for out in outs]

    first, second = results_on("cuda:0"), results_on("cuda:1")
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("kernel", ["hopper", "tensor_cores"])
def test_f2_captured_prompts_are_right_for_other_lengths(kernel, cuda):
    """F2: other lengths of queries and of keys, of the same number of tokens in all."""
    if kernel not in prefill_variants():
        pytest.skip(f"this GPU or build has no kernel {kernel}")
    q, k, v = (torch.randn(n, h, 64, device=cuda, dtype=torch.float16) for n, h in ((TOKENS, 8), (3000, 2), (3000, 2)))
    batches = [(q_lens, (700, 300, 1990, 10)) for q_lens, _ in BATCHES] + [((17, 18, 19, 16), (3000, 0, 0, 0))]
    ends, k_ends = (torch.zeros(BATCH + 1, device=cuda, dtype=torch.int32) for _ in range(2))
    given = {"cu_seqlens_q": ends, "cu_seqlens_k": k_ends, "return_lse": True}

    def set_lengths(batch):
        for to, lengths in zip((ends, k_ends), batch, strict=True):
            to.copy_(torch.tensor([0, *lengths]).cumsum(0).int())

    with force_kernel(kernel):
        set_lengths(batches[0])
        prefill_attention(q, k, v, **given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = prefill_attention(q, k, v, **given)
        for batch in (*batches, batches[0]):
            set_lengths(batch)
            q.copy_(torch.randn_like(q))
            graph.replay()
            expected, expected_lse = prefill_attention(q, k, v, **given)
            assert torch.equal(out, expected) and torch.equal(lse, expected_lse), batch
            assert torch.isfinite(out).all()


@pytest.mark.parametrize("bad", [-1, 10**9, 2**31 - 1])
@pytest.mark.parametrize("kv_format", ["fp16", "int8"])
def test_a5_a_bad_live_page_id_is_not_dereferenced(kv_format, bad, cuda):
    """A5: documented for CUDA: never dereferenced; other sequences keep their results. Many query tokens and one."""
    case = RaggedCase(kv_format=kv_format, seq_lens=(33, 40, 130, 70), q_lens=(33, 40, 1, 70))
    problem = make_hybrid_problem(case)
    expected = hybrid_tensors(problem, cuda)[0]
    problem.page_table[1, 1] = problem.page_table[2, 3] = bad
    out = hybrid_tensors(problem, cuda)[0]
    torch.cuda.synchronize()
    for b, rows in enumerate(rows_of(case)):
        assert torch.equal(out[rows], expected[rows]) == (b in (0, 3)), b


@pytest.mark.parametrize("kv_format", ["fp16", "int8"])
def test_a_length_beyond_the_table_counts_as_the_capacity(kv_format, cuda):
    case = RaggedCase(kv_format=kv_format, seq_lens=(48, 48, 48), q_lens=(40, 2, 48))
    problem = make_hybrid_problem(case)
    problem.page_table = np.ascontiguousarray(problem.page_table[:, :3])
    expected = hybrid_tensors(problem, cuda)[0]
    longer = replace(problem, seq_lens=problem.seq_lens + np.array([0, 7, 10**6], np.int32))
    assert torch.equal(hybrid_tensors(longer, cuda)[0], expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_f1_two_streams_at_once_do_not_share_scratch(options, cuda):
    """A10, F4: hybrid batches that overlap in time."""
    case = RaggedCase(seq_lens=(3000, 700, 9, 40), q_lens=(1, 3, 0, 40))
    problems = [make_hybrid_problem(replace(case, seed=seed)) for seed in range(2)]
    calls = [(query_tensor(p, cuda), make_cache(p, cuda), keywords(p, cuda) | options) for p in problems]
    expected = [hybrid_attention(q, cache, **given) for q, cache, given in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    results = [[], []]
    for _ in range(50):
        for i, (q, cache, given) in enumerate(calls):
            with torch.cuda.stream(streams[i]):
                results[i].append(hybrid_attention(q, cache, **given))
    torch.cuda.synchronize()
    for i, outs in enumerate(results):
        assert all(torch.equal(out, expected[i]) for out in outs)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a10_a_hybrid_batch_does_not_depend_on_leftovers_of_other_calls(options, cuda):
    """A10: the same call before and after one whose partial results are all NaN."""
    problem = make_hybrid_problem(RaggedCase(seq_lens=(300, 5, 129, 40), q_lens=(2, 1, 16, 40)))
    q, cache, given = query_tensor(problem, cuda), make_cache(problem, cuda), keywords(problem, cuda) | options
    before = hybrid_attention(q, cache, **given)
    rows = torch.full((4096, 8, 256), torch.nan, device=cuda, dtype=torch.float16)
    broken = KVCache.from_tensors(rows.view(2, 2048, 8, 256), rows.view(2, 2048, 8, 256))
    ends, lens = (torch.tensor(x, dtype=torch.int32, device=cuda) for x in ((0, 16, 18), (2048, 1500)))
    nan = hybrid_attention(rows[:18], broken, cu_seqlens_q=ends, seq_lens=lens, **options)
    assert nan.isnan().all()
    assert torch.equal(hybrid_attention(q, cache, **given), before)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_f4_thousands_of_sequences(options, cuda):
    """F4: of none to three query tokens each; those with one equal a call of decode_attention for them alone."""
    batch = 5000
    cache = KVCache.allocate(64, 16, 2, 64, device=cuda)
    rows = torch.randn(2, 1024, 2, 64, device=cuda)
    cache.append(rows[0], rows[1], torch.arange(1024, device=cuda))
    table = torch.randint(64, (batch, 4), device=cuda, dtype=torch.int32)
    counts, lens = torch.randint(4, (batch,), device=cuda), torch.randint(65, (batch,), device=cuda, dtype=torch.int32)
    ends = torch.zeros(batch + 1, dtype=torch.int32, device=cuda)
    ends[1:] = counts.cumsum(0)
    q = torch.randn(int(ends[-1]), 8, 64, device=cuda, dtype=torch.float16)
    out = hybrid_attention(q, cache, cu_seqlens_q=ends, seq_lens=lens, page_table=table, **options)
    lone = (counts == 1).nonzero()[:, 0]
    expected = decode_attention(q[ends[lone].long()], cache, seq_lens=lens[lone], page_table=table[lone])
    torch.testing.assert_close(out[ends[lone].long()], expected, rtol=2e-3, atol=2e-3)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("kv_format", ["int8", "fp16"])
def test_compiled_with_graphs_equals_eager(kv_format, cuda):
    """torch.compile(mode="reduce-overhead"): inductor's own CUDA graphs round append and hybrid attention."""
    cache, table = filled_cache(kv_format, cuda)
    ends, lens = (torch.zeros(n, device=cuda, dtype=torch.int32) for n in (BATCH + 1, BATCH))

    def step(q, ends, lens):
        return hybrid_attention(q, cache, cu_seqlens_q=ends, seq_lens=lens, page_table=table) * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for batch in BATCHES * 2:
        set_batch(ends, lens, batch)
        q = torch.randn(TOKENS, 8, 64, device=cuda, dtype=torch.float16)
        assert torch.equal(compiled(q, ends, lens).clone(), step(q, ends, lens)), batch
