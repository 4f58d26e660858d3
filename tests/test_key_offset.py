"""Key offsets: codes hold k - offset, and attention is that over the keys themselves, whatever the offset is."""

import copy
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from bridge import bits_of_tensor, check, decode_tensors, kernel_tolerance, keywords, make_cache, query_tensor
from bridge import values_of_tensor as values
from cases import Case, make_problem
from comparison import assert_close, assert_close_absolute, assert_same_bits
from ragged import RaggedCase, check_hybrid, make_hybrid_problem

from pyquantattn import (
    KVCache,
    decode_attention,
    dequantize_kv,
    estimate_k_offset,
    hybrid_attention,
    merge_states,
    quantize_kv,
)

PAIRS = ["fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2", "fp16/int8", "bf16/int8", "fp16/fp8_e4m3", "bf16/fp8_e4m3"]
PAIRS.append("int8/fp8_e4m3")
DTYPES = ["float32", "float16", "bfloat16"]
OFFSET = Case(key_offset=3.0, num_q_tokens=3, seq_lens=(37, 0, 130, 2))
EVERYTHING = {
    "alibi": "rows", "sliding_window": 21, "logits_soft_cap": 6.0, "has_sinks": True, "has_starts": True,
    "sm_scale": 0.2,
}  # fmt: skip
FEATURES = [{}, {"has_sinks": True}, {"logits_soft_cap": 6.0}, {"alibi": "heads", "sliding_window": 21}, EVERYTHING]
MIXED = RaggedCase(seq_lens=(37, 12, 130, 70, 200, 3, 17, 0), q_lens=(1, 0, 130, 4, 65, 9, 17, 2), key_offset=3.0)
features = pytest.mark.parametrize("options", FEATURES, ids=lambda options: "+".join(options) or "plain")


@features
@pytest.mark.parametrize("q_dtype", DTYPES)
@pytest.mark.parametrize("kv_format", PAIRS)
def test_decode_is_attention_over_the_keys_themselves(kv_format, q_dtype, options, device):
    """Output and log-sum-exp, with sinks, soft cap, ALiBi and window: the reference adds the offset to every key."""
    check(make_problem(replace(OFFSET, kv_format=kv_format, q_dtype=q_dtype, **options)), device)


@features
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_format", PAIRS)
def test_hybrid_is_attention_over_the_keys_themselves(kv_format, causal, options, hybrid_device):
    case = replace(MIXED, kv_format=kv_format, causal=causal, **options)
    check_hybrid(make_hybrid_problem(case), hybrid_device)


@pytest.mark.parametrize(
    "run_options", [{"batch_invariant": True}, *({"num_splits": n} for n in (1, 2, 7, 200))], ids=str
)
@pytest.mark.parametrize("options", [{"has_sinks": True}, {"logits_soft_cap": 6.0}], ids=str)
def test_splits(options, run_options, device):
    """Parts of a sequence, some of them without keys, are joined before the offset or have it already: never twice."""
    check(make_problem(replace(OFFSET, seq_lens=(600, 3, 0, 130), **options)), device, **run_options)


@pytest.mark.parametrize("head_dim", [32, 40, 72, 128, 256])
@pytest.mark.parametrize("group", [1, 7, 17])
def test_head_dims_and_groups(head_dim, group, device):
    check(make_problem(replace(OFFSET, head_dim=head_dim, group=group, has_sinks=True, layout="HND")), device)


@pytest.mark.parametrize("scales", ["head", "tensor"])
@pytest.mark.parametrize("kv_format", ["int8", "fp8_e4m3"])
def test_static_scales(kv_format, scales, device):
    check(make_problem(replace(OFFSET, kv_format=kv_format, scales=scales, has_sinks=True)), device)


@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e4m3"])
def test_large_offsets_cost_the_output_nothing(kv_format, device):
    """Scores of some hundreds: without a soft cap the offset stays out of them, so that their digits are kept. On a GPU
    it is in the maxima of the parts of a sequence, whose weights lose 2^-24 of it."""
    problem = make_problem(replace(OFFSET, kv_format=kv_format, key_offset=100.0, q_dtype="float32"))
    plain = make_problem(replace(OFFSET, kv_format=kv_format, q_dtype="float32", key_offset=0.0))
    (out, lse), (plain_out, _) = decode_tensors(problem, device), decode_tensors(plain, device)
    if device == "cpu":
        assert torch.equal(out, plain_out)
    assert_close(values(out), values(plain_out), relative=1e-4)
    expected = problem.expected()[1]
    sees_keys = np.isfinite(expected)
    assert np.abs(expected[sees_keys]).max() > 100
    assert_close(values(lse)[sees_keys], expected[sees_keys], relative=kernel_tolerance(kv_format, device), what="lse")


@features
@pytest.mark.parametrize("kv_format", PAIRS)
def test_an_offset_of_zero_changes_no_bit(kv_format, options, device):
    problem = make_problem(replace(OFFSET, kv_format=kv_format, key_offset=0.0, **options))
    zero = replace(problem, k_offset=np.zeros((2, 64), np.float32))
    for plain, with_zero in zip(decode_tensors(problem, device), decode_tensors(zero, device), strict=True):
        assert torch.equal(plain, with_zero)


@features
def test_the_output_is_the_same_without_a_log_sum_exp(options, device):
    """The offset is left out where nothing depends on it; sinks and soft cap do, asked for the log-sum-exp or not."""
    problem = make_problem(replace(OFFSET, **options))
    q, cache, given = query_tensor(problem, device), make_cache(problem, device), keywords(problem, device)
    assert torch.equal(decode_attention(q, cache, **given), decode_attention(q, cache, return_lse=True, **given)[0])


def test_a_row_without_keys_stays_empty_whatever_its_query(device):
    """lse is -inf, or the sink: also where the query, and with it q . offset, is NaN or large."""
    problem = make_problem(replace(OFFSET, seq_lens=(0, 37, 0), num_q_tokens=1, q_dtype="float32"))
    problem.q[0], problem.q[2] = np.nan, 1e6
    for cap in (None, 6.0):
        given = keywords(problem, device) | {"logits_soft_cap": cap}
        q, cache = query_tensor(problem, device), make_cache(problem, device)
        out, lse = decode_attention(q, cache, return_lse=True, **given)
        assert (out[[0, 2]] == 0).all() and (lse[[0, 2]] == -torch.inf).all() and out[1].isfinite().all()
        sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], device=device)
        out, lse = decode_attention(q, cache, return_lse=True, sinks=sinks, **given)
        assert (out[[0, 2]] == 0).all() and torch.equal(lse[[0, 2]], sinks.expand(2, 4))


def test_nan_in_a_query_shows(device):
    problem = make_problem(replace(OFFSET, seq_lens=(5, 37), has_sinks=True, q_dtype="float32"))
    problem.q[0, :, 1, 7] = np.nan
    out, lse = decode_tensors(problem, device)
    assert out[0, :, 1].isnan().all() and lse[0, :, 1].isnan().all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()


def test_merged_halves_equal_the_whole(device):
    """Log-sum-exps of partial results count the offset in, so merge_states needs to know nothing of it."""
    problem = make_problem(replace(OFFSET, seq_lens=(120,), num_q_tokens=1, page_size=None, q_dtype="float32"))
    q, cache = query_tensor(problem, device), make_cache(problem, device)
    lens = [torch.tensor([n], dtype=torch.int32, device=device) for n in (70, 120)]
    whole = decode_attention(q, cache, seq_lens=lens[1], return_lse=True)
    first = decode_attention(q, cache, seq_lens=lens[0], return_lse=True)
    second = decode_attention(q, cache, seq_lens=lens[1], seq_starts=lens[0], return_lse=True)
    for merged, expected in zip(merge_states(*first, *second), whole, strict=True):
        assert_close(values(merged), values(expected), relative=1e-4)


def rows_with_offset(heads, dim, dtype, device, num_tokens=9):
    """K and V [T, H, D] with infinities and NaN in K, and an offset for it."""
    rng = np.random.default_rng(5)
    offset = (40 * rng.normal(size=(heads, dim))).astype(np.float32)
    k, v = (torch.from_numpy(x.astype(np.float32)) for x in rng.normal(size=(2, num_tokens, heads, dim)))
    k += torch.from_numpy(offset)
    k[2, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    k[3, 1, 1] = -torch.tensor(torch.nan)
    return k.to(device, dtype), v.to(device, dtype), torch.from_numpy(offset).to(device)


def by_slot(tensor, layout):
    """Bits as [slot, head, ...]."""
    bits = bits_of_tensor(tensor if layout == "NHD" else tensor.transpose(1, 2))
    return bits.reshape(-1, *bits.shape[2:])


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv_format", PAIRS)
def test_append_writes_the_reference_bits_of_k_minus_offset(kv_format, dtype, layout, device):
    """One float32 subtraction, then the format: the same bytes on every backend. V has no offset."""
    k, v, offset = rows_with_offset(3, 72, dtype, device)
    cache = KVCache.allocate(4, 5, 3, 72, kv_format=kv_format, device=device, layout=layout, k_offset=offset)
    slots = torch.tensor([13, 4, 0, 19, 6, 7, 5, 1, 2])
    cache.append(k, v, slots.to(device))
    sides = zip(
        (k, v), (offset, None), oracle.split_pair(kv_format), (cache.k, cache.v), (cache.k_scale, cache.v_scale),
        strict=True,
    )  # fmt: skip
    for x, own_offset, fmt, codes, scale in sides:
        subtracted = None if own_offset is None else own_offset.cpu().numpy()
        expected, expected_scale = oracle.quantize(values(x).astype(np.float32), fmt, offset=subtracted)
        written = by_slot(codes, layout)[slots]
        if fmt.name in ("fp16", "bf16"):  # the payload of a NaN is the converting instruction's
            written, expected = without_nan_payload(written, fmt), without_nan_payload(expected, fmt)
        assert_same_bits(written, expected.view(written.dtype), f"codes of {fmt.name}")
        if fmt.has_scale:
            assert_same_bits(by_slot(scale, layout)[slots], expected_scale.astype(np.float16).view(np.uint16), "scales")


def without_nan_payload(bits, fmt):
    is_nan = np.isnan(oracle.codecs.decode(bits, fmt))
    return np.where(is_nan, bits.dtype.type(0), bits)


@pytest.mark.parametrize("kv_format", ["int8", "fp8_e4m3"])
def test_append_with_static_scales(kv_format, device):
    k, v, offset = rows_with_offset(3, 64, torch.float32, device)
    k_scale = np.array([0.01, 0.02, 0.005], np.float32)
    cache = KVCache.allocate(
        1, 9, 3, 64, kv_format, device, k_scale=torch.from_numpy(k_scale).to(device), v_scale=1.0, k_offset=offset
    )
    cache.append(k, v, torch.arange(9, device=device))
    fmt = oracle.FORMATS[kv_format]
    expected, _ = oracle.quantize(values(k).astype(np.float32), fmt, k_scale, offset.cpu().numpy())
    assert_same_bits(bits_of_tensor(cache.k)[0], expected.view(np.uint8), "codes")


@pytest.mark.parametrize("shape", [(3, 64), (7, 3, 64), (2, 5, 3, 64), (2, 2, 4, 3, 1100)], ids=str)
@pytest.mark.parametrize("kv_format", ["fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2"])
def test_quantize_and_dequantize_with_an_offset(kv_format, shape, device):
    """As the reference does: bits of the codes, and code * scale + offset of each number."""
    rng, fmt = np.random.default_rng(1), oracle.FORMATS[kv_format]
    offset = (30 * rng.normal(size=shape[-2:])).astype(np.float32)
    x = (rng.normal(size=shape) + offset).astype(np.float32)
    given = torch.from_numpy(offset).to(device)
    codes, scale = quantize_kv(torch.from_numpy(x).to(device), kv_format, offset=given)
    expected, expected_scale = oracle.quantize(x, fmt, offset=offset)
    assert_same_bits(bits_of_tensor(codes), expected.view(f"u{fmt.code_bytes}"), "codes")
    numbers = oracle.dequantize(expected, fmt, expected_scale, offset)
    for dtype, rounding in ((torch.float32, 2.0**-23), (torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        decoded = values(dequantize_kv(codes, scale, dtype, given))
        np.testing.assert_allclose(decoded, numbers, rtol=1.01 * rounding, atol=2.0**-20)


def test_chunks_of_any_size_write_the_same_cache(hybrid_device):
    """A prompt with an offset, whole or in chunks, with hybrid_attention after each: one cache, one result."""
    device = hybrid_device
    k, v, offset = rows_with_offset(2, 64, torch.float32, device, num_tokens=64)
    k = k.nan_to_num(1.0, 1.0, 1.0)
    q = torch.randn(64, 4, 64, device=device)
    results, caches = [], []
    for sizes in ((64,), (1,) * 5 + (30, 17, 12)):
        cache = KVCache.allocate(4, 16, 2, 64, device=device, k_offset=offset)
        table = torch.tensor([[2, 0, 3, 1]], dtype=torch.int32, device=device)
        parts, end = [], 0
        for size in sizes:
            tokens = torch.arange(end, end + size, device=device)
            cache.append(k[tokens], v[tokens], table[0, tokens // 16].long() * 16 + tokens % 16)
            end += size
            ends, lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, size], [end]))
            parts.append(
                torch.cat(
                    [x.flatten(1) for x in hybrid_attention(
                        q[tokens], cache, cu_seqlens_q=ends, seq_lens=lens, page_table=table, return_lse=True
                    )], 1)
            )  # fmt: skip
        results.append(values(torch.cat(parts)))
        caches.append(cache)
    assert torch.equal(caches[0].k, caches[1].k) and torch.equal(caches[0].k_scale, caches[1].k_scale)
    assert_close(results[1], results[0], relative=1e-3)


def output_error(kv_format, k, v, q, k_offset, device):
    """Of decode_attention against float64 attention over the K and V that were appended."""
    length, heads, dim = k.shape
    cache = KVCache.allocate(1, length, heads, dim, kv_format, device, k_offset=k_offset)
    cache.append(k, v, torch.arange(length, device=device))
    lens = torch.tensor([length], dtype=torch.int32, device=device)
    out = values(decode_attention(q, cache, seq_lens=lens))
    pages = (values(x)[None] for x in (k, v))
    expected, _ = oracle.decode_attention(values(q)[:, None], *pages, seq_lens=np.array([length]))
    return np.linalg.norm(out - expected[:, 0]) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("kv_format", "least_gain", "largest_error"),
    [("int8", 30, 0.012), ("fp8_e4m3", 6, 0.045), ("fp8_e5m2", 2.5, 0.095), ("fp16", 7, 6e-4), ("bf16", 7, 4e-3)],
)
def test_an_estimated_offset_takes_a_key_bias_out_of_the_error(kv_format, least_gain, largest_error, device):
    """Three channels of each head with offsets of 90 to 150, as in Qwen2.5: what is left is the error of Gaussian keys.
    Measured: int8 0.36 to 0.0093, E4M3 0.29 to 0.036, E5M2 0.26 to 0.079, fp16 4.3e-3 to 3e-4, bf16 0.038 to 2.5e-3."""
    generator = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, 2048, 2, 128, generator=generator)
    k[..., [3, 50, 99]] += torch.tensor([120.0, -95.0, 145.0])
    q = torch.randn(1, 8, 128, generator=generator)
    k, v, q = k.to(device), v.to(device), q.to(device)
    plain = output_error(kv_format, k, v, q, None, device)
    centred = output_error(kv_format, k, v, q, estimate_k_offset(k[:128]), device)
    assert centred <= largest_error and plain >= least_gain * centred, (plain, centred)


def test_the_estimate_is_the_mean_key(device):
    k = torch.randn(2, 50, 3, 64, device=device) + 7
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        estimate = estimate_k_offset(k.to(dtype))
        assert estimate.shape == (3, 64) and estimate.dtype == torch.float32 and estimate.is_contiguous()
        assert_close(values(estimate), values(k.to(dtype)).mean((0, 1)), relative=1e-6)


def test_the_offset_travels_with_the_cache(device):
    """It is an attribute, counted in the bytes, kept by copies, shared without a copy, and read when a call runs."""
    offset = torch.randn(2, 64, device=device)
    cache = KVCache.allocate(3, 8, 2, 64, device=device, k_offset=offset)
    assert cache.k_offset is offset and KVCache.allocate(3, 8, 2, 64).k_offset is None
    assert cache.nbytes == KVCache.allocate(3, 8, 2, 64).nbytes + offset.nbytes
    assert cache.bits_per_element == 8 * cache.nbytes / (2 * 3 * 8 * 2 * 64)
    twin = copy.deepcopy(cache)
    assert torch.equal(twin.k_offset, offset) and twin.k_offset is not offset
    one_for_all_heads = KVCache.from_tensors(
        cache.k, cache.v, cache.k_scale, cache.v_scale, k_offset=offset[:1].expand(2, 64)
    )
    assert one_for_all_heads.k_offset.data_ptr() == offset.data_ptr()
    k = torch.randn(8, 2, 64, device=device)
    cache.append(k, k, torch.arange(8, device=device))
    q, lens = torch.randn(1, 2, 64, device=device), torch.tensor([8], dtype=torch.int32, device=device)
    _, before = decode_attention(q, cache, seq_lens=lens, return_lse=True)
    offset += 1
    _, after = decode_attention(q, cache, seq_lens=lens, return_lse=True)
    assert_close_absolute(values(after - before), values(q.sum(-1)) / 8, tolerance=1e-4, what="lse")


def test_dequantized_keys_have_the_offset(device):
    k, v, offset = rows_with_offset(3, 64, torch.float32, device)
    k = k.nan_to_num(1.0, 1.0, 1.0)
    for layout in ("NHD", "HND"):
        cache = KVCache.allocate(1, 9, 3, 64, device=device, layout=layout, k_offset=offset)
        cache.append(k, v, torch.arange(9, device=device))
        pages = [x if layout == "NHD" else x.transpose(1, 2) for x in cache.dequantize()]
        for page, x in zip(pages, (k, v), strict=True):
            assert float((page[0] - x).abs().max()) < 0.5


def test_a_moved_offset_is_refused(device):
    offset = torch.zeros(2, 64, device=device)
    cache = KVCache.allocate(1, 8, 2, 64, device=device, k_offset=offset)
    offset.resize_(1 << 16, 64)
    row = torch.zeros(1, 2, 64, device=device)
    with pytest.raises(ValueError, match=r"^append_kv: the cache's k_offset must stay where it was"):
        cache.append(row, row, torch.tensor([0], device=device))


def test_an_output_over_the_offset_is_refused(device):
    offset = torch.zeros(2, 64, device=device)
    cache = KVCache.allocate(1, 8, 2, 64, device=device, k_offset=offset)
    lens = torch.tensor([0], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"^decode_attention: out must not share memory with .*k_offset"):
        decode_attention(torch.zeros(1, 2, 64, device=device), cache, seq_lens=lens, out=offset[None])


def test_an_offset_on_another_device_is_refused(cuda):
    with pytest.raises(ValueError, match=r"^KVCache: k_offset must be on cuda:0 like k, got cpu"):
        KVCache.allocate(1, 8, 2, 64, device=cuda, k_offset=torch.zeros(2, 64))
    with pytest.raises(ValueError, match=r"^KVCache: k_offset must be on cpu like k, got cuda:0"):
        KVCache.allocate(1, 8, 2, 64, k_offset=torch.zeros(2, 64, device=cuda))


def test_a_graph_reads_the_offset_of_the_moment(cuda):
    """Append and decode, captured once: replays follow the offset's values."""
    offset = torch.zeros(2, 64, device=cuda)
    cache = KVCache.allocate(1, 8, 2, 64, device=cuda, k_offset=offset)
    k, v, q = (torch.randn(8, 2, 64, device=cuda) for _ in range(3))
    slots, lens = torch.arange(8, device=cuda), torch.tensor([8], dtype=torch.int32, device=cuda)

    def run():
        cache.append(k, v, slots)
        return decode_attention(q[:1], cache, seq_lens=lens, return_lse=True)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    offset.normal_(std=5)
    graph.replay()
    for replayed, eager in zip(captured, run(), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.parametrize(("wavelength", "gains"), [(1e6, (20, 60)), (500, (0.8, 1.25))])
def test_a_bias_before_rotary_embeddings_is_constant_in_slow_channels_alone(wavelength, gains, device):
    """A bias of 120 in one rotary pair over 2,048 positions: in a slow pair the mean key takes it out, in a fast one
    there is no mean to take out, and nothing is lost either."""
    generator = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, 2048, 2, 128, generator=generator)
    angles = 2 * torch.pi * torch.arange(2048) / wavelength
    k[..., 20] += 120 * angles.cos()[:, None]
    k[..., 84] += 120 * angles.sin()[:, None]
    q = torch.randn(1, 8, 128, generator=generator)
    k, v, q = k.to(device), v.to(device), q.to(device)
    gain = output_error("int8", k, v, q, None, device) / output_error("int8", k, v, q, estimate_k_offset(k), device)
    assert gains[0] < gain < gains[1]
