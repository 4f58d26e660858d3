"""Strides and alignment of prefill_attention and hybrid_attention: where the bytes lie must not matter.

Each test moves the same numbers into another arrangement of memory, noise in the gaps, and expects the same bits."""

from dataclasses import replace

import pytest
import torch
from bridge import keywords, make_cache, query_tensor
from ragged import (
    FORMAT_OF_DTYPE,
    RaggedCase,
    assert_same_results,
    make_hybrid_problem,
    make_prefill_problem,
    need_prefill_of,
    prefill_arguments,
    prefill_keywords,
)
from test_layout import (
    across_layers,
    interleaved,
    moved,
    noise_like,
    padded_heads,
    rearranged,
    same_bits,
    strided,
    transposed,
    untouched_pool,
)

from pyquantattn import KVCache, hybrid_attention, prefill_attention

DTYPES = ["float32", "float16", "bfloat16"]
CASE = RaggedCase(seq_lens=(37, 0, 130, 5), q_lens=(37, 2, 70, 1), alibi="rows", has_sinks=True, has_starts=True)


def fused(q, k, v):
    """Slices of one projection [T, Hq + 2 H, D]."""
    qkv = noise_like((q.shape[0], q.shape[1] + 2 * k.shape[1], q.shape[2]), q.dtype, q.device)
    parts = qkv.split((q.shape[1], k.shape[1], k.shape[1]), dim=1)
    return [moved(x, lambda _, part=part: part) for x, part in zip((q, k, v), parts, strict=True)]


def heads_first(q, k, v):
    """[H, T, D] in memory, as a batch of one sequence of transformers' [B, H, T, D] has it."""
    return [
        moved(x, lambda x: noise_like((x.shape[1], x.shape[0], x.shape[2]), x.dtype, x.device).transpose(0, 1))
        for x in (q, k, v)
    ]


def interleaved_heads(q, k, v):
    """K and V take turns head by head in one tensor."""
    kv = noise_like((k.shape[0], k.shape[1], 2, k.shape[2]), k.dtype, k.device)
    return [q, moved(k, lambda _: kv[:, :, 0]), moved(v, lambda _: kv[:, :, 1])]


def padded(q, k, v):
    """Odd gaps after each head and each token, and a base address that is aligned to the element alone."""

    def wider(x):
        return noise_like((x.shape[0], x.shape[1] + 1, x.shape[2] + 41), x.dtype, x.device)[:, :-1, 1 : 1 + x.shape[2]]

    return [moved(x, wider) for x in (q, k, v)]


def every_other_token(q, k, v):
    """Every other token of a longer tensor."""
    return [moved(x, lambda x: noise_like((2 * x.shape[0], *x.shape[1:]), x.dtype, x.device)[::2]) for x in (q, k, v)]


def each_its_own(q, k, v):
    """K and V in different arrangements."""
    return [every_other_token(q, k, v)[0], heads_first(q, k, v)[1], padded(q, k, v)[2]]


@pytest.mark.parametrize("arrange", [fused, heads_first, interleaved_heads, padded, every_other_token, each_its_own])
@pytest.mark.parametrize("dtype", DTYPES)
def test_c2_prefill_takes_any_strides(dtype, arrange, prefill_device):
    """C2: q, k and v as slices of a fused projection, transposed, padded; a strided output."""
    case = replace(CASE, q_lens=None, q_dtype=dtype)
    problem = make_prefill_problem(case)
    tensors, given = prefill_arguments(problem, prefill_device), prefill_keywords(problem, prefill_device)
    expected = prefill_attention(*tensors, return_lse=True, **given)
    out = noise_like((tensors[0].shape[1], tensors[0].shape[0], 72), tensors[0].dtype, prefill_device)
    out = out.transpose(0, 1)[..., 8:]
    result = prefill_attention(*arrange(*tensors), out=out, return_lse=True, **given)
    assert result[0] is out
    assert_same_results(result, expected, FORMAT_OF_DTYPE[dtype], prefill_device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_c2_one_tensor_may_be_queries_keys_and_values(dtype, prefill_device):
    """Inputs may overlap each other, also by stride 0."""
    need_prefill_of(dtype, prefill_device)
    x = torch.randn(70, 4, 64, device=prefill_device).to(getattr(torch, dtype))
    ends = torch.tensor([0, 70], dtype=torch.int32, device=prefill_device)
    expected = prefill_attention(x, x.clone(), x.clone(), cu_seqlens_q=ends)
    assert torch.equal(prefill_attention(x, x, x, cu_seqlens_q=ends), expected)
    one_head = x[:, :1].expand(70, 4, 64)
    expected = prefill_attention(x, one_head.clone(), one_head.clone(), cu_seqlens_q=ends)
    assert torch.equal(prefill_attention(x, one_head, one_head, cu_seqlens_q=ends), expected)


def test_c2_small_tensors_of_prefill_may_be_strided(prefill_device):
    problem = make_prefill_problem(CASE)
    tensors, given = prefill_arguments(problem, prefill_device), prefill_keywords(problem, prefill_device)
    sparse = {name: strided(t, -7) for name, t in given.items() if torch.is_tensor(t)}
    assert set(sparse) == {"cu_seqlens_q", "cu_seqlens_k", "seq_starts", "alibi_slopes", "sinks"}
    expected = prefill_attention(*tensors, return_lse=True, **given)
    assert same_bits(prefill_attention(*tensors, return_lse=True, **(given | sparse)), expected)


def test_c2_small_tensors_of_hybrid_may_be_strided(hybrid_device):
    problem = make_hybrid_problem(CASE)
    q, cache, given = (make(problem, hybrid_device) for make in (query_tensor, make_cache, keywords))
    sparse = {name: strided(t, -7) for name, t in given.items() if torch.is_tensor(t)}
    assert set(sparse) == {"cu_seqlens_q", "seq_lens", "page_table", "seq_starts", "alibi_slopes", "sinks"}
    expected = hybrid_attention(q, cache, return_lse=True, **given)
    assert same_bits(hybrid_attention(q, cache, return_lse=True, **(given | sparse)), expected)


@pytest.mark.parametrize("arrange", [interleaved, across_layers, transposed, padded_heads])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e4m3"])
def test_c2_hybrid_takes_any_strides(kv_format, head_dim, layout, arrange, hybrid_device):
    """C2: caches in any arrangement, q a slice of a fused projection, a strided output."""
    problem = make_hybrid_problem(replace(CASE, kv_format=kv_format, head_dim=head_dim, layout=layout))
    q, cache, given = (make(problem, hybrid_device) for make in (query_tensor, make_cache, keywords))
    expected = hybrid_attention(q, cache, return_lse=True, **given)
    (sliced, _, _) = fused(q, q[:, :2], q[:, :2])
    out = noise_like((q.shape[1], q.shape[0], q.shape[2]), q.dtype, q.device).transpose(0, 1)
    result = hybrid_attention(sliced, rearranged(cache, arrange), out=out, return_lse=True, **given)
    assert_same_results(result, expected, kv_format, hybrid_device, problem.case.q_dtype)


@pytest.mark.parametrize("kv_format", ["fp16", "int8"])
def test_c2_layouts_are_views_of_the_same_bytes(kv_format, hybrid_device):
    """C2: HND and NHD of one memory agree bit by bit."""
    problem = make_hybrid_problem(replace(CASE, kv_format=kv_format))
    q, cache, given = (make(problem, hybrid_device) for make in (query_tensor, make_cache, keywords))
    as_hnd = KVCache.from_tensors(
        cache.k.transpose(1, 2),
        cache.v.transpose(1, 2),
        *(s if s is None else s.transpose(1, 2) for s in (cache.k_scale, cache.v_scale)),
        layout="HND",
    )
    assert torch.equal(hybrid_attention(q, as_hnd, **given), hybrid_attention(q, cache, **given))


@pytest.mark.parametrize("head_dim", [40, 64, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_c4_base_pointers_of_prefill_need_only_element_alignment(offset, dtype, head_dim, prefill_device):
    problem = make_prefill_problem(RaggedCase(seq_lens=(37, 0, 20), q_dtype=dtype, head_dim=head_dim))
    tensors, given = prefill_arguments(problem, prefill_device), prefill_keywords(problem, prefill_device)

    def run_at(offset):
        def shifted(x):
            flat = noise_like((x.numel() + 16,), x.dtype, x.device)
            return moved(x, lambda _: flat[offset : offset + x.numel()].view(x.shape))

        return prefill_attention(*map(shifted, tensors), return_lse=True, **given)

    expected = prefill_attention(*tensors, return_lse=True, **given)
    try:
        result = run_at(offset)
    except ValueError as error:
        assert "align" in str(error) and prefill_device != "cpu"
        return
    assert_same_results(result, expected, FORMAT_OF_DTYPE[dtype], prefill_device, dtype)
    assert same_bits(result, run_at(3)), "no copy engine reads either"


def test_c1_huge_strides_of_fresh_keys(prefill_device):
    """C1: tokens 2^27 elements apart, so that indices pass 2^32; memory that is never touched costs nothing."""
    x = torch.randn(37, 2, 64, dtype=torch.float16, device=prefill_device)
    ends = torch.tensor([0, 37], dtype=torch.int32, device=prefill_device)
    distance = 2**27 + 64
    pool = untouched_pool(2 * (distance * 36 + 128), prefill_device).view(torch.float16)
    far = moved(x, lambda x: pool.as_strided(x.shape, (distance, 64, 1)))
    assert torch.equal(
        prefill_attention(far, far, far, cu_seqlens_q=ends), prefill_attention(x, x, x, cu_seqlens_q=ends)
    )


@pytest.mark.parametrize("kv_format", ["int8", "fp16"])
def test_c1_huge_strides_of_cached_keys(kv_format, hybrid_device):
    """C1: pages 2^31 elements apart, under whole prompts, chunks and decoding."""
    scales = "head" if kv_format == "int8" else "token_head"
    case = RaggedCase(kv_format=kv_format, scales=scales, seq_lens=(70, 9, 40), q_lens=(70, 1, 20), page_size=None)
    problem = make_hybrid_problem(case)
    q, cache, given = (make(problem, hybrid_device) for make in (query_tensor, make_cache, keywords))
    expected = hybrid_attention(q, cache, **given)
    distance = 2**31 + 64
    bytes_needed = (distance * (cache.num_pages - 1) + cache.k[0].numel()) * cache.k.element_size()

    def spread(tensor):
        pool = untouched_pool(bytes_needed, hybrid_device)
        return moved(tensor, lambda t: pool.view(t.dtype).as_strided(t.shape, (distance, *t.stride()[1:])))

    far = KVCache.from_tensors(spread(cache.k), spread(cache.v), k_scale=cache.k_scale, v_scale=cache.v_scale)
    assert torch.equal(hybrid_attention(q, far, **given), expected)
