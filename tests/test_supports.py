"""supports(...) equals what happens, over the whole grid; nothing falls back in silence."""

import itertools

import pytest
import torch

import pyquantattn
from pyquantattn import KVCache, UnsupportedError, decode_attention, supports

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
