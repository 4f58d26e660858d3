"""supports(...) equals what happens, over the whole grid; nothing falls back in silence."""

import itertools

import pytest
import torch

import pyquantattn
from pyquantattn import KVCache, UnsupportedError, decode_attention, hybrid_attention, prefill_attention, supports

FORMATS = ["fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2"]
NAMES = [f"{k}/{v}" if k != v else k for k, v in itertools.product(FORMATS, FORMATS)]
HEAD_DIMS = [*range(8, 265, 8), 1, 4, 20, 33, 46, 100, 250, 320, 512]


def happens(kv_format, head_dim, device, num_q_heads=1, num_kv_heads=1, num_q_tokens=1, q_dtype=torch.float32):
    """Whether a call with these arguments works."""
    try:
        cache = KVCache.allocate(1, 4, num_kv_heads, head_dim, kv_format=kv_format, device=device)
        q = torch.zeros(1, num_q_tokens, num_q_heads, head_dim, device=device, dtype=q_dtype)
        decode_attention(q, cache, seq_lens=torch.ones(1, dtype=torch.int32, device=device))
    except (ValueError, UnsupportedError):
        return False
    return True


@pytest.mark.parametrize("kv_format", NAMES)
def test_formats_and_head_dims(kv_format, device):
    for head_dim in HEAD_DIMS:
        assert supports(kv_format, head_dim, device=device) == happens(kv_format, head_dim, device), head_dim


@pytest.mark.parametrize("kv_format", FORMATS)
def test_query_tokens_heads_and_dtypes(kv_format, device):
    for n in (0, 1, 2, 15, 16, 17, 100):
        assert supports(kv_format, 64, num_q_tokens=n, device=device) == happens(kv_format, 64, device, num_q_tokens=n)
    for heads in itertools.product((0, 1, 2, 3, 12, 71, 128, 256), (1, 2, 3, 4, 71)):
        expected = happens(kv_format, 64, device, *heads)
        assert supports(kv_format, 64, num_q_heads=heads[0], num_kv_heads=heads[1], device=device) == expected, heads
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.float8_e4m3fn):
        assert supports(kv_format, 64, q_dtype=dtype, device=device) == happens(kv_format, 64, device, q_dtype=dtype)


def prefill_happens(head_dim, device, num_q_heads=1, num_kv_heads=1, num_q_tokens=1, q_dtype=torch.float32):
    """Whether prefill_attention works with these arguments."""
    try:
        q, k = (
            torch.zeros(num_q_tokens, heads, head_dim, device=device, dtype=q_dtype)
            for heads in (num_q_heads, num_kv_heads)
        )
        prefill_attention(q, k, k, cu_seqlens_q=torch.tensor([0, num_q_tokens], dtype=torch.int32, device=device))
    except (ValueError, UnsupportedError):
        return False
    return True


def hybrid_happens(kv_format, head_dim, device, num_q_heads=1, num_kv_heads=1, num_q_tokens=1, q_dtype=torch.float32):
    """Whether hybrid_attention works with these arguments."""
    try:
        cache = KVCache.allocate(1, 4, num_kv_heads, head_dim, kv_format=kv_format, device=device)
        q = torch.zeros(num_q_tokens, num_q_heads, head_dim, device=device, dtype=q_dtype)
        ends, lens = (torch.tensor(n, dtype=torch.int32, device=device) for n in ([0, num_q_tokens], [3]))
        hybrid_attention(q, cache, cu_seqlens_q=ends, seq_lens=lens)
    except (ValueError, UnsupportedError):
        return False
    return True


# The axes of the grid, one at a time; values that no call can take among them.
AXES = [
    *({"head_dim": head_dim} for head_dim in HEAD_DIMS),
    *({"num_q_tokens": n} for n in (0, 1, 2, 15, 16, 17, 100)),
    *({"num_q_heads": q, "num_kv_heads": kv} for q, kv in itertools.product((0, 1, 2, 3, 12, 71, 128), (1, 2, 3, 71))),
    *({"q_dtype": d} for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8)),
]


def test_prefill_is_supported_where_it_happens(device):
    """On every backend, those without kernels included."""
    for change in AXES:
        values = {"head_dim": 64, "q_dtype": torch.float32, **change}
        said = supports(None, operation="prefill_attention", device=device, **values)
        assert said == prefill_happens(device=device, **values), change


@pytest.mark.parametrize("kv_format", NAMES)
def test_hybrid_is_supported_where_it_happens(kv_format, device):
    for change in AXES if kv_format in ("int8", "fp16", "fp8_e4m3") else AXES[: len(HEAD_DIMS)]:
        values = {"head_dim": 64, "q_dtype": torch.float32, **change}
        said = supports(kv_format, operation="hybrid_attention", device=device, **values)
        assert said == hybrid_happens(kv_format, device=device, **values), change


def test_operations_and_formats_go_together():
    """Prefill over fresh K and V has no KV format; the others need one."""
    assert supports(None, 64, operation="prefill_attention")
    assert not supports("int8", 64, operation="prefill_attention")
    assert not supports(None, 64, operation="hybrid_attention") and not supports(
        "int7", 64, operation="hybrid_attention"
    )
    for wrong in ("prefill", "append_kv", "", None, 3, ["hybrid_attention"]):
        with pytest.raises(ValueError, match=r"^supports: operation must be one of decode_attention, .*, got"):
            supports("int8", 64, operation=wrong)


def test_names_that_are_none():
    for name in ("", "int7", "INT8", "int8/", "/int8", "int8/int8", "fp16/fp8_e5m2/int8"):
        assert not supports(name, 64)


def test_values_that_no_call_could_take_are_not_supported():
    assert not supports(None, 64) and not supports(["int8"], 64)
    for wrong in (0, -64, 2**31, 2**70, 64.0, "64", None, True):
        assert not supports("int8", wrong) and not supports("int8", 64, num_q_heads=wrong, num_kv_heads=wrong)
    with pytest.raises(ValueError, match=r"^supports: device must be a torch.device or its name, got 'mars'"):
        supports("int8", 64, device="mars")


def test_devices_without_a_backend_are_not_supported():
    assert not supports("int8", 64, device="meta")
    if "cuda" not in pyquantattn.available_backends():
        assert not supports("int8", 64, device="cuda")


def test_the_promised_grid_is_there():
    """Same-format pairs, fp16/bf16 K with int8 and E4M3 V, int8 K with E4M3 V; every multiple of 8 from 32 to 256."""
    mixed = ["fp16/int8", "bf16/int8", "fp16/fp8_e4m3", "bf16/fp8_e4m3", "int8/fp8_e4m3"]
    for kv_format, head_dim, n in itertools.product(FORMATS + mixed, range(32, 257, 8), (1, 16)):
        assert supports(kv_format, head_dim, num_q_heads=71, num_q_tokens=n)
        assert supports(kv_format, head_dim, operation="hybrid_attention", num_q_heads=71, num_q_tokens=4096 * n)
    for head_dim, dtype in itertools.product(range(32, 257, 8), (torch.float32, torch.float16, torch.bfloat16)):
        assert supports(None, head_dim, operation="prefill_attention", num_q_heads=71, q_dtype=dtype)
