"""Strides, alignment and large indices: where the bytes lie must not matter.

Each test moves the same numbers into another arrangement of memory, with noise in the gaps, and expects the same bits.
"""

import pytest
import torch
from bridge import decode_tensors, keywords, make_cache, query_tensor
from cases import Case, make_problem

import pyquantattn

FORMATS = ["fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2"]
CASE = Case(seq_lens=(37, 0, 130, 5), num_q_tokens=2, alibi="rows", has_sinks=True, has_starts=True)


def noise_like(shape, dtype, device):
    """Random bytes, NaN patterns among them."""
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, device=device).view(dtype)


def moved(tensor, make_view):
    """The same numbers in the view that `make_view` takes of some noise."""
    view = make_view(tensor)
    assert view.shape == tensor.shape
    if tensor.dim() and view.stride(-1) == 1 and tensor.stride(-1) == 1:
        view.view(torch.uint8).copy_(tensor.view(torch.uint8))  # bit patterns of NaN, too
    else:
        view.copy_(tensor)
    return view


def interleaved(k, v):
    """K and V in one pool: [pages, 2, tokens, heads, dim]."""
    pool = noise_like((k.shape[0], 2, *k.shape[1:]), k.dtype, k.device)
    return moved(k, lambda _: pool[:, 0]), moved(v, lambda _: pool[:, 1])


def across_layers(k, v):
    """One block per page for three layers, so that pages of a layer lie far apart."""
    pool = noise_like((k.shape[0], 3, 2, *k.shape[1:]), k.dtype, k.device)
    return moved(k, lambda _: pool[:, 1, 0]), moved(v, lambda _: pool[:, 1, 1])


def transposed(k, v):
    """Heads before tokens in memory, tokens before heads in shape."""

    def swapped(t):
        return noise_like((t.shape[0], t.shape[2], t.shape[1], t.shape[3]), t.dtype, t.device).transpose(1, 2)

    return moved(k, swapped), moved(v, swapped)


def padded_heads(k, v):
    """Head rows of 40 more elements: an odd number of 8-element groups in the gaps."""

    def wider(t):
        return noise_like((*t.shape[:-1], t.shape[-1] + 40), t.dtype, t.device)[..., 8 : 8 + t.shape[-1]]

    return moved(k, wider), moved(v, wider)


def page_size_first(k, v):
    def permuted(t):
        return noise_like((t.shape[1], t.shape[2], t.shape[0], t.shape[3]), t.dtype, t.device).permute(2, 0, 1, 3)

    return moved(k, permuted), moved(v, permuted)


def scattered_scale(scale):
    """Axes in reverse order in memory and NaN between any two scales."""
    if scale is None:
        return None
    wide = torch.full((*reversed(scale.shape), 3), float("nan"), dtype=scale.dtype, device=scale.device)
    return moved(scale, lambda _: wide[..., 1].permute(*reversed(range(scale.dim()))))


def rearranged(cache, arrange):
    k, v = arrange(cache.k, cache.v)
    return pyquantattn.KVCache.from_tensors(
        k, v, k_scale=scattered_scale(cache.k_scale), v_scale=scattered_scale(cache.v_scale), layout=cache.layout
    )


def same_bits(a, b):
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("arrange", [interleaved, across_layers, transposed, padded_heads, page_size_first])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("scales", ["token_head", "head"])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_c2_cache_strides_are_free(kv_format, scales, layout, arrange, device):
    """C2: interleaved, cross-layer, permuted and padded caches, non-contiguous scales."""
    scales = "token_head" if kv_format in ("fp16", "bf16") else scales
    problem = make_problem(Case(kv_format=kv_format, scales=scales, layout=layout, seq_lens=CASE.seq_lens))
    q, cache, given = query_tensor(problem, device), make_cache(problem, device), keywords(problem, device)
    expected = pyquantattn.decode_attention(q, cache, return_lse=True, **given)
    moved_cache = rearranged(cache, arrange)
    assert same_bits(pyquantattn.decode_attention(q, moved_cache, return_lse=True, **given), expected)


def test_c2_cache_layout_is_a_view_only(device):
    """C2: HND and NHD of the same memory agree."""
    problem = make_problem(Case(seq_lens=CASE.seq_lens))
    q, cache, given = query_tensor(problem, device), make_cache(problem, device), keywords(problem, device)
    as_hnd = pyquantattn.KVCache.from_tensors(
        cache.k.transpose(1, 2),
        cache.v.transpose(1, 2),
        k_scale=cache.k_scale.transpose(1, 2),
        v_scale=cache.v_scale.transpose(1, 2),
        layout="HND",
    )
    assert torch.equal(
        pyquantattn.decode_attention(q, as_hnd, **given), pyquantattn.decode_attention(q, cache, **given)
    )


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("kv_format", ["int8", "fp16"])
def test_c2_append_into_interleaved_keys_and_values(kv_format, layout, device):
    """C2: K and V may take turns in one pool, pages or heads: what overlaps in range does not overlap in bytes."""
    plain = pyquantattn.KVCache.allocate(3, 4, 2, 64, kv_format=kv_format, device=device, layout=layout)
    scales = plain.k_scale, plain.v_scale
    k, v = torch.randn(2, 5, 2, 64, device=device)
    slots = torch.tensor([0, 11, 5, -1, 7], device=device)
    for pool_axis in (1, 2, 3):
        shape = (*plain.k.shape[:pool_axis], 2, *plain.k.shape[pool_axis:])
        pool = torch.zeros(shape, dtype=plain.k.dtype, device=device)
        cache = pyquantattn.KVCache.from_tensors(
            *pool.unbind(pool_axis), *(s if s is None else torch.zeros_like(s) for s in scales), layout=layout
        )
        for each in (plain, cache):
            each.append(k, v, slots)
        assert same_bits((cache.k, cache.v), (plain.k, plain.v))


@pytest.mark.parametrize("axis", [1, 2])
def test_c2_an_output_may_lie_beside_the_query_in_one_buffer(axis, device):
    problem = make_problem(Case(seq_lens=(37, 0, 130, 5), q_dtype="float32"))
    q, cache, given = query_tensor(problem, device), make_cache(problem, device), keywords(problem, device)
    buffer = torch.stack([q, torch.full_like(q, float("nan"))], dim=axis)
    beside, out = buffer.unbind(axis)
    pyquantattn.decode_attention(beside, cache, out=out, **given)
    assert torch.equal(out, pyquantattn.decode_attention(q, cache, **given)) and torch.equal(beside, q)


def strided(tensor, axis_noise):
    """Every other element of the last axis and every other row of a larger tensor."""
    shape = [2 * n for n in tensor.shape]
    wide = torch.full(shape, axis_noise, dtype=tensor.dtype, device=tensor.device)
    return moved(tensor, lambda _: wide[tuple(slice(None, None, 2) for _ in shape)])


@pytest.mark.parametrize("q_dtype", ["float32", "float16", "bfloat16"])
def test_c2_queries_outputs_and_tables_may_be_strided(q_dtype, device):
    """C2: q sliced out of a fused QKV, a strided output, non-contiguous lengths, tables, slopes, sinks and starts."""
    problem = make_problem(Case(**{**CASE.__dict__, "q_dtype": q_dtype}))
    q, cache, given = query_tensor(problem, device), make_cache(problem, device), keywords(problem, device)
    expected, expected_lse = decode_tensors(problem, device)
    fused = torch.full((*q.shape[:2], q.shape[2] + 4, q.shape[3]), float("nan"), dtype=q.dtype, device=q.device)
    sliced = moved(q, lambda _: fused[:, :, : q.shape[2]])
    sparse = {name: strided(t, -7) for name, t in given.items() if torch.is_tensor(t)}
    out = torch.full((q.shape[0], q.shape[2], q.shape[1], q.shape[3]), float("nan"), dtype=q.dtype, device=q.device)
    out = out.transpose(1, 2)
    _, lse = pyquantattn.decode_attention(sliced, cache, out=out, return_lse=True, **(given | sparse))
    assert same_bits((out, lse), (expected, expected_lse))


@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8])
def test_c4_base_pointers_need_only_element_alignment(offset, kv_format, head_dim, device):
    """C4: a cache and a query that start anywhere: the same bits, or a clean error."""
    problem = make_problem(Case(kv_format=kv_format, head_dim=head_dim, seq_lens=(37, 0, 20)))
    q, cache, given = query_tensor(problem, device), make_cache(problem, device), keywords(problem, device)

    def shifted(t):
        flat = noise_like((t.numel() + 16,), t.dtype, t.device)
        return moved(t, lambda _: flat[offset : offset + t.numel()].view(t.shape))

    expected = pyquantattn.decode_attention(q, cache, return_lse=True, **given)
    try:
        unaligned = pyquantattn.KVCache.from_tensors(
            shifted(cache.k), shifted(cache.v), k_scale=cache.k_scale, v_scale=cache.v_scale
        )
        result = pyquantattn.decode_attention(shifted(q), unaligned, return_lse=True, **given)
    except (ValueError, pyquantattn.UnsupportedError) as error:
        assert "align" in str(error) and device != "cpu"
        return
    assert same_bits(result, expected)


@pytest.mark.parametrize("kv_format", ["int8", "fp16"])
def test_c1_huge_strides(kv_format, device):
    """C1: pages 2^33 elements apart by stride, of which only the ends exist."""
    scales = "head" if kv_format == "int8" else "token_head"
    problem = make_problem(Case(kv_format=kv_format, seq_lens=(20, 9, 14), page_size=None, scales=scales))
    q, cache, given = query_tensor(problem, device), make_cache(problem, device), keywords(problem, device)
    expected = pyquantattn.decode_attention(q, cache, **given)
    page = cache.k[0].numel()
    distance = 2**31 + 64  # elements between pages; 4 pages reach past 2^32
    bytes_needed = (distance * (cache.k.shape[0] - 1) + page) * cache.k.element_size()
    big_k, big_v = untouched_pool(bytes_needed, device), untouched_pool(bytes_needed, device)
    strides = (distance, *cache.k.stride()[1:])

    def spread(tensor, pool):
        return moved(tensor, lambda t: pool.view(t.dtype).as_strided(t.shape, strides))

    spread_cache = pyquantattn.KVCache.from_tensors(
        spread(cache.k, big_k), spread(cache.v, big_v), k_scale=cache.k_scale, v_scale=cache.v_scale
    )
    assert torch.equal(pyquantattn.decode_attention(q, spread_cache, **given), expected)


def untouched_pool(num_bytes, device):
    """Memory that is reserved and never touched costs a CPU nothing; a GPU must have it."""
    if device != "cpu" and num_bytes > torch.cuda.mem_get_info()[0] // 2:
        pytest.skip(f"needs {num_bytes >> 30} GiB of free GPU memory")
    try:
        return torch.empty(num_bytes // 8 * 8 + 8, dtype=torch.uint8, device=device)
    except RuntimeError:
        pytest.skip(f"the system refuses to reserve {num_bytes >> 30} GiB")


@pytest.mark.parametrize("kv_format", ["int8", "fp16"])
def test_c1_page_ids_past_two_to_the_32_elements(kv_format, device):
    """C1: live pages at the top of a pool of more than 2^32 elements, their scales likewise; append there, too."""
    heads, dim, page_size = 8, 128, 16
    num_pages = 2**32 // (heads * dim * page_size) + 64
    element = 1 if kv_format == "int8" else 2
    pools = [untouched_pool(num_pages * page_size * heads * dim * element, device) for _ in range(2)]
    dtype = torch.int8 if kv_format == "int8" else torch.float16
    shape = (num_pages, page_size, heads, dim)
    size = num_pages * page_size * heads * dim
    k, v = (pool.view(dtype)[:size].view(shape) for pool in pools)
    scales = {}
    if kv_format == "int8":
        scales = {name: torch.empty(shape[:3], dtype=torch.float16, device=device) for name in ("k_scale", "v_scale")}
    big = pyquantattn.KVCache.from_tensors(k, v, **scales)
    small = pyquantattn.KVCache.allocate(8, page_size, heads, dim, kv_format=kv_format, device=device)
    rows = torch.randn(100, heads, dim, device=device), 3 * torch.randn(100, heads, dim, device=device)
    first = num_pages - 8
    slots = torch.arange(100, device=device)
    small.append(*rows, slots)
    big.append(*rows, slots + first * page_size)
    q = torch.randn(3, 2 * heads, dim, device=device)
    table = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 5, 4]], dtype=torch.int32, device=device)
    lens = torch.tensor([40, 33, 4], dtype=torch.int32, device=device)
    expected = pyquantattn.decode_attention(q, small, seq_lens=lens, page_table=table)
    assert torch.equal(pyquantattn.decode_attention(q, big, seq_lens=lens, page_table=table + first), expected)
