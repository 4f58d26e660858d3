"""KVCache: sizes, append, dequantize, and that codes stay where they were written."""

import numpy as np
import oracle
import pytest
import torch
from bridge import bits_of_tensor, values_of_tensor
from comparison import assert_close, assert_same_bits

import pyquantattn

FORMATS = ["fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2"]
PAIRS = [*FORMATS, "fp16/int8", "bf16/int8", "fp16/fp8_e4m3", "bf16/fp8_e4m3", "int8/fp8_e4m3"]


def rows(num_tokens, heads=3, dim=64, seed=0, device="cpu"):
    rng = np.random.default_rng(seed)
    k, v = (
        rng.normal(size=(2, num_tokens, heads, dim)).astype(np.float32)
        * np.array([0.7, 2.5], np.float32)[:, None, None, None]
    )
    return torch.from_numpy(k).to(device), torch.from_numpy(v).to(device)


def everything(cache):
    """All bytes of a cache."""
    tensors = [t for t in (cache.k, cache.v, cache.k_scale, cache.v_scale) if t is not None]
    return [t.contiguous().view(torch.uint8).clone() for t in tensors]


def fill_with_noise(cache):
    for tensor in (cache.k, cache.v, cache.k_scale, cache.v_scale):
        if tensor is not None and tensor.dim() > 1:
            raw = tensor.view(torch.uint8)
            raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8, device=raw.device))


@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("static", [False, True])
def test_bytes_and_savings_are_what_the_table_says(kv_format, static, device):
    """int8 per (token, head) at head_dim 128 saves 49.2 % of fp16's bytes, static FP8 and int8 save 50 %."""
    if kv_format == "fp16" and static:
        pytest.skip("fp16 has no scale")
    scales = {"k_scale": torch.tensor(0.1), "v_scale": torch.tensor(0.2)} if static else {}
    scales = {name: scale.to(device) for name, scale in scales.items()}
    cache = pyquantattn.KVCache.allocate(10, 16, 4, 128, kv_format=kv_format, device=device, **scales)
    fp16_bytes = 2 * 10 * 16 * 4 * 128 * 2
    saving = 100 * (1 - cache.nbytes / fp16_bytes)
    if kv_format == "fp16":
        assert cache.nbytes == fp16_bytes and cache.bits_per_element == 16
    elif static:
        assert abs(saving - 50) < 0.01
    else:
        assert cache.nbytes == 2 * 10 * 16 * 4 * (128 + 2)
        assert round(saving, 1) == 49.2
        assert cache.bits_per_element == pytest.approx(8 * 130 / 128)
    real = sum(t.numel() * t.element_size() for t in (cache.k, cache.v, cache.k_scale, cache.v_scale) if t is not None)
    assert cache.nbytes == real


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("kv_format", PAIRS)
def test_allocated_tensors_have_the_promised_shapes_and_dtypes(kv_format, layout, device):
    cache = pyquantattn.KVCache.allocate(5, 8, 3, 64, kv_format=kv_format, device=device, layout=layout)
    shape = (5, 8, 3) if layout == "NHD" else (5, 3, 8)
    for fmt, codes, scale in zip(
        oracle.split_pair(kv_format), (cache.k, cache.v), (cache.k_scale, cache.v_scale), strict=True
    ):
        assert codes.shape == (*shape, 64) and codes.dtype == getattr(torch, fmt.torch_dtype)
        if fmt.has_scale:
            assert scale.shape == shape and scale.dtype == torch.float16
        else:
            assert scale is None
    assert (cache.layout, cache.kv_format) == (layout, kv_format)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv_format", PAIRS)
def test_append_writes_the_reference_bits_into_its_slots_and_nothing_else(kv_format, dtype, layout, device):
    """A6: other bytes and scales keep their bits; a slot of -1 writes nothing."""
    cache = pyquantattn.KVCache.allocate(4, 5, 3, 64, kv_format=kv_format, device=device, layout=layout)
    fill_with_noise(cache)
    k, v = (x.to(dtype) for x in rows(7, device=device))
    slots = [13, -1, 0, 19, -1, 7, 6]
    untouched = [s for s in range(20) if s not in slots]
    before = [by_slot(t, layout) for t in (cache.k, cache.v, cache.k_scale, cache.v_scale)]
    cache.append(k, v, torch.tensor(slots, device=device))
    after = [by_slot(t, layout) for t in (cache.k, cache.v, cache.k_scale, cache.v_scale)]
    for old, new in zip(before, after, strict=True):
        if old is not None:
            assert_same_bits(new[untouched], old[untouched], "untouched slots")
    written = [(t, s) for t, s in enumerate(slots) if s >= 0]
    for x, fmt, codes, scale in zip((k, v), oracle.split_pair(kv_format), after[:2], after[2:], strict=True):
        expected, expected_scale = oracle.quantize(values_of_tensor(x).astype(np.float32), fmt)
        for t, s in written:
            assert_same_bits(codes[s], expected[t].view(codes.dtype), f"codes of slot {s}")
            if fmt.has_scale:
                assert_same_bits(scale[s], expected_scale[t].astype(np.float16).view(np.uint16), f"scale of slot {s}")


@pytest.mark.parametrize("dim", [40, 136, 248])
@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e5m2"])
def test_append_writes_the_reference_bits_of_every_width(kv_format, dim, device):
    """D4: the largest channel, which sets a dynamic scale, may be any of them."""
    cache = pyquantattn.KVCache.allocate(2, dim, 1, dim, kv_format=kv_format, device=device)
    k, v = (x.half() for x in rows(dim, heads=1, dim=dim, device=device))
    channels = torch.arange(dim, device=device)
    k[channels, 0, channels] = 30  # of token t channel t
    v[channels, 0, channels] = -50
    cache.append(k, v, channels)
    [fmt, _] = oracle.split_pair(kv_format)
    for x, codes, scale in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
        expected, expected_scale = oracle.quantize(values_of_tensor(x).astype(np.float32), fmt)
        written = bits_of_tensor(codes[0])
        assert_same_bits(written, expected.view(written.dtype), "codes")
        if fmt.has_scale:
            assert_same_bits(bits_of_tensor(scale[0]), expected_scale.astype(np.float16).view(np.uint16), "scales")


def by_slot(tensor, layout):
    """Bits as [slot, head, ...]."""
    if tensor is None:
        return None
    bits = bits_of_tensor(tensor if layout == "NHD" else tensor.transpose(1, 2))
    return bits.reshape(-1, *bits.shape[2:]).copy()


@pytest.mark.parametrize("kv_format", ["int8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("granularity", ["head", "tensor"])
def test_append_with_static_scales_uses_and_keeps_them(kv_format, granularity, device):
    """A9, D4: static scales are the caller's: append reads them and never writes them."""
    per_head = np.array([0.01, 0.02, 0.005], np.float32)
    k_scale, v_scale = (per_head, 3 * per_head) if granularity == "head" else (per_head[0], per_head[1])
    cache = pyquantattn.KVCache.allocate(
        2, 8, 3, 64, kv_format=kv_format, device=device,
        k_scale=torch.as_tensor(k_scale, device=device), v_scale=torch.as_tensor(v_scale, device=device),
    )  # fmt: skip
    k, v = rows(6, device=device)
    cache.append(k, v, torch.arange(6, device=device))
    fmt = oracle.FORMATS[kv_format]
    for x, codes, scale in ((k, cache.k, k_scale), (v, cache.v, v_scale)):
        expected, _ = oracle.quantize(x.cpu().numpy(), fmt, scale)
        assert_same_bits(by_slot(codes, "NHD")[:6], expected.view(np.uint8), "codes")
    np.testing.assert_array_equal(cache.k_scale.cpu().numpy(), k_scale)
    np.testing.assert_array_equal(cache.v_scale.cpu().numpy(), v_scale)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_append_equals_quantize_kv(kv_format, device):
    cache = pyquantattn.KVCache.allocate(1, 9, 3, 64, kv_format=kv_format, device=device)
    k, v = rows(9, device=device)
    cache.append(k, v, torch.arange(9, device=device))
    for x, codes, scale in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
        expected, expected_scale = pyquantattn.quantize_kv(x, kv_format)
        assert torch.equal(codes[0].view(torch.uint8), expected.view(torch.uint8))
        assert scale is None or torch.equal(scale[0], expected_scale)


@pytest.mark.parametrize("kv_format", PAIRS)
def test_dequantize_matches_the_reference(kv_format, device):
    cache = pyquantattn.KVCache.allocate(1, 9, 3, 64, kv_format=kv_format, device=device)
    k, v = rows(9, device=device)
    cache.append(k, v, torch.arange(9, device=device))
    formats = oracle.split_pair(kv_format)
    for x, fmt, actual in zip((k, v), formats, cache.dequantize(), strict=True):
        codes, scale = oracle.quantize(x.cpu().numpy(), fmt)
        expected = oracle.dequantize(codes, fmt, scale).astype(np.float32)
        np.testing.assert_array_equal(values_of_tensor(actual.float())[0], expected)


def test_from_tensors_copies_nothing(device):
    source = pyquantattn.KVCache.allocate(3, 4, 2, 64, device=device)
    cache = pyquantattn.KVCache.from_tensors(source.k, source.v, k_scale=source.k_scale, v_scale=source.v_scale)
    for name in ("k", "v", "k_scale", "v_scale"):
        assert getattr(cache, name).data_ptr() == getattr(source, name).data_ptr()


@pytest.mark.parametrize("name", ["k", "v", "k_scale", "v_scale"])
def test_a_cache_whose_tensors_have_moved_is_refused(name, device):
    """Pointers are taken once, when the cache is made: no resized tensor may be read through an old one."""
    cache = pyquantattn.KVCache.allocate(2, 4, 1, 64, device=device)
    tensor = getattr(cache, name)
    tensor.resize_(64, *tensor.shape[1:])
    row = torch.zeros(1, 1, 64, device=device)
    message = f"the cache's {name} must stay where it was when the cache was made, got address "
    with pytest.raises(ValueError, match=f"^append_kv: {message}"):
        cache.append(row, row, torch.tensor([0], device=device))
    with pytest.raises(ValueError, match=f"^decode_attention: {message}"):
        pyquantattn.decode_attention(row, cache, seq_lens=torch.tensor([1], dtype=torch.int32, device=device))


def test_a9_nothing_re_initialises_codes_or_scales(device):
    """A9: wrapping, decoding, looking at sizes and appending elsewhere leave written tokens alone."""
    cache = pyquantattn.KVCache.allocate(3, 8, 2, 64, device=device)
    k, v = rows(8, heads=2, device=device)
    cache.append(k, v, torch.arange(8, device=device))
    first_page = [t[0].clone() for t in (cache.k, cache.v, cache.k_scale, cache.v_scale)]
    again = pyquantattn.KVCache.from_tensors(cache.k, cache.v, k_scale=cache.k_scale, v_scale=cache.v_scale)
    again.append(k[:2], v[:2], torch.tensor([9, 17], device=device))
    q = torch.randn(1, 4, 64, device=device)
    pyquantattn.decode_attention(q, again, seq_lens=torch.tensor([8], dtype=torch.int32, device=device))
    assert cache.nbytes > 0 and cache.bits_per_element > 8 and again.dequantize()
    for before, tensor in zip(first_page, (cache.k, cache.v, cache.k_scale, cache.v_scale), strict=True):
        assert torch.equal(tensor[0], before)


@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e4m3"])
@pytest.mark.parametrize("chunks", [(1,) * 23, (16, 7), (5, 11, 7)], ids=str)
def test_f7_chunks_of_any_size_write_the_same_cache(chunks, kv_format, device):
    """F7: a prompt appended in chunks equals one appended at once, bit for bit, and so do steps over it."""
    k, v = rows(23, heads=2, device=device)
    slots = torch.randperm(40, device=device)[:23]
    at_once, chunked = (pyquantattn.KVCache.allocate(5, 8, 2, 64, kv_format=kv_format, device=device) for _ in range(2))
    at_once.append(k, v, slots)
    for part in torch.arange(23, device=device).split(list(chunks)):
        chunked.append(k[part], v[part], slots[part])
    assert all(torch.equal(a, b) for a, b in zip(everything(at_once), everything(chunked), strict=True))


def test_k_and_v_may_have_scales_of_different_granularity(device):
    """Static K beside dynamic V, and the other way round."""
    k, v = rows(9, device=device)
    q, lens = torch.randn(1, 6, 64, device=device), torch.tensor([9], dtype=torch.int32, device=device)
    for k_scale, v_scale in ((torch.tensor([0.01, 0.02, 0.03], device=device), None), (None, 0.05)):
        cache = pyquantattn.KVCache.allocate(1, 9, 3, 64, device=device, k_scale=k_scale, v_scale=v_scale)
        cache.append(k, v, torch.arange(9, device=device))
        stored = (values_of_tensor(x) for x in cache.dequantize())
        expected, _ = oracle.decode_attention(values_of_tensor(q)[:, None], *stored, seq_lens=np.array([9]))
        out = values_of_tensor(pyquantattn.decode_attention(q, cache, seq_lens=lens))
        assert_close(out, expected[:, 0], relative=1e-3)


def test_f6_rollback_keeps_nothing_stale(device):
    """F6: append 5, roll back 3, append 2 others: equals a fresh cache of the 4."""
    k, v = rows(7, heads=2, device=device)
    rolled, fresh = (pyquantattn.KVCache.allocate(2, 3, 2, 64, device=device) for _ in range(2))
    rolled.append(k[:5], v[:5], torch.arange(5, device=device))
    rolled.append(k[5:], v[5:], torch.tensor([2, 3], device=device))
    kept = [0, 1, 5, 6]
    fresh.append(k[kept], v[kept], torch.arange(4, device=device))
    q = torch.randn(1, 4, 64, device=device)
    table = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
    lens = torch.tensor([4], dtype=torch.int32, device=device)
    results = [pyquantattn.decode_attention(q, c, seq_lens=lens, page_table=table) for c in (rolled, fresh)]
    assert torch.equal(*results)


@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e4m3"])
def test_d11_errors_do_not_build_up_over_a_teacher_forced_loop(kv_format, device):
    """D11: 256 steps of append and decode; each step equals the reference, late ones like early ones."""
    steps, heads, dim = 256, 2, 64
    k, v = rows(steps, heads, dim, device=device)
    formats = oracle.split_pair(kv_format)
    stored = [oracle.quantize(x.cpu().numpy(), fmt) for x, fmt in zip((k, v), formats, strict=True)]
    k64, v64 = (oracle.dequantize(c, fmt, s)[None] for (c, s), fmt in zip(stored, formats, strict=True))
    cache = pyquantattn.KVCache.allocate(-(-steps // 16), 16, heads, dim, kv_format=kv_format, device=device)
    table = torch.arange(-(-steps // 16), dtype=torch.int32, device=device)[None]
    q = torch.randn(steps, 1, 4, dim, device=device)
    errors = []
    for t in range(steps):
        cache.append(k[t : t + 1], v[t : t + 1], torch.tensor([t], device=device))
        lens = torch.tensor([t + 1], dtype=torch.int32, device=device)
        out = values_of_tensor(pyquantattn.decode_attention(q[t], cache, seq_lens=lens, page_table=table))
        expected, _ = oracle.decode_attention(values_of_tensor(q[t])[:, None], k64, v64, seq_lens=np.array([t + 1]))
        errors.append(np.linalg.norm(out - expected[:, 0]) / np.linalg.norm(expected))
    assert max(errors) <= 1e-3
    assert np.median(errors[-64:]) <= max(3 * np.median(errors[:64]), 2e-6)
