"""Every wrong argument is an error that says who, the rule and the value; nothing is written."""

# ruff: noqa: E501 - tables of one line for each wrong argument

import re

import pytest
import torch

import pyquantattn
from pyquantattn import (
    KVCache,
    UnsupportedError,
    decode_attention,
    dequantize_kv,
    estimate_k_offset,
    merge_states,
    quantize_kv,
)

B, HQ, HKV, D, PAGE = 3, 4, 2, 64, 8


def good_arguments(device="cpu", kv_format="int8", num_q_tokens=None):
    """Arguments of a call that works; tests break one of them."""
    cache = KVCache.allocate(8, PAGE, HKV, D, kv_format=kv_format, device=device)
    rows = torch.randn(2, 64, HKV, D, device=device)
    cache.append(rows[0], rows[1], torch.arange(64, device=device))
    shape = (B, HQ, D) if num_q_tokens is None else (B, num_q_tokens, HQ, D)
    return {
        "q": torch.randn(shape, device=device),
        "cache": cache,
        "seq_lens": torch.tensor([5, 0, 17], dtype=torch.int32, device=device),
        "page_table": torch.arange(9, dtype=torch.int32, device=device).view(3, 3) % 8,
        "out": torch.full(shape, 7.0, device=device),
    }


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD_DECODE = {
    "q_dtype": ({"q": torch.zeros(B, HQ, D, dtype=torch.float64)}, r"q must be float32, float16 or bfloat16, got float64"),
    "q_int": ({"q": torch.zeros(B, HQ, D, dtype=torch.int32)}, r"q must be .*, got int32"),
    "q_dims": ({"q": torch.zeros(B, D)}, r"q must have shape .*\[3, 64\]"),
    "q_5d": ({"q": torch.zeros(B, 1, 1, HQ, D)}, r"q must have .*"),
    "q_head_dim": ({"q": torch.zeros(B, HQ, 32)}, r"q must have shape .*\[3, 4, 32\]"),
    "q_stride": ({"q": torch.zeros(B, HQ, 2 * D)[..., ::2]}, r"q must be contiguous in its last dimension .* got stride 2"),
    "q_none": ({"q": None}, r"q must be a torch.Tensor, got NoneType"),
    "q_list": ({"q": [[1.0]]}, r"q must be a torch.Tensor, got list"),
    "heads": ({"q": torch.zeros(B, 5, D), "out": None}, r"num_q_heads must be a multiple of num_kv_heads, got 5 and 2"),
    "zero_heads": ({"q": torch.zeros(B, 0, D), "out": None}, r"num_q_heads must be .*, got 0"),
    "17_tokens": ({"q": torch.zeros(B, 17, HQ, D), "out": None}, r"q must have 1 to 16 query tokens per sequence, got 17"),
    "0_tokens": ({"q": torch.zeros(B, 0, HQ, D), "out": None}, r"q must have 1 to 16 query tokens per sequence, got 0"),
    "q_sparse": ({"q": torch.zeros(B, HQ, D).to_sparse()}, r"q must be .*"),
    "q_negative_view": ({"q": torch._neg_view(torch.ones(B, HQ, D))}, r"q must hold its numbers themselves, got the negative view"),
    "q_meta": ({"q": torch.zeros(B, HQ, D, device="meta")}, r"q must be .*"),
    "seq_lens_dtype": ({"seq_lens": torch.tensor([5, 0, 17])}, r"seq_lens must be int32, got int64"),
    "seq_lens_shape": ({"seq_lens": ints(5, 0)}, r"seq_lens must have shape \[B\] = \[3\], got \[2\]"),
    "seq_lens_dims": ({"seq_lens": ints(5, 0, 1).view(3, 1)}, r"seq_lens must have shape .*"),
    "seq_lens_list": ({"seq_lens": [5, 0, 17]}, r"seq_lens must be a torch.Tensor, got list"),
    "seq_lens_negative": ({"seq_lens": ints(5, -1, 17)}, r"seq_lens\[1\] must be in \[0, 24\] .*, got -1"),
    "seq_lens_long": ({"seq_lens": ints(5, 0, 25)}, r"seq_lens\[2\] must be in \[0, 24\] .*, got 25"),
    "seq_lens_int_max": ({"seq_lens": ints(5, 0, 2**31 - 1)}, r"seq_lens\[2\] must be in .*, got 2147483647"),
    "table_dtype": ({"page_table": torch.zeros(3, 3, dtype=torch.int64)}, r"page_table must be int32, got int64"),
    "table_float": ({"page_table": torch.zeros(3, 3)}, r"page_table must be int32, got float32"),
    "table_shape": ({"page_table": ints(0, 1, 2)}, r"page_table must have shape .*, got \[3\]"),
    "table_batch": ({"page_table": torch.zeros(2, 3, dtype=torch.int32)}, r"page_table must have shape .*, got \[2, 3\]"),
    "table_page": ({"page_table": ints(0, 1, 2, 3, 4, 5, 6, 7, 8).view(3, 3)}, r"page_table\[2, 2\] must be in \[0, 8\), got 8"),
    "table_minus": ({"page_table": ints(-1, 1, 2, 3, 4, 5, 6, 7, 0).view(3, 3)}, r"page_table\[0, 0\] must be in .*, got -1"),
    "no_table": ({"page_table": None, "seq_lens": ints(5, 0, 9)}, r"seq_lens\[2\] must be in \[0, 8\] .*, got 9"),
    "no_table_few_pages": (
        {"page_table": None, "cache": KVCache.allocate(2, PAGE, HKV, D), "seq_lens": ints(5, 0, 0)},
        r"without page_table sequence b owns page b, .*, got 2 pages for batch_size 3",
    ),
    "starts_dtype": ({"seq_starts": torch.zeros(3)}, r"seq_starts must be int32, got float32"),
    "starts_shape": ({"seq_starts": ints(0)}, r"seq_starts must have shape .*, got \[1\]"),
    "starts_negative": ({"seq_starts": ints(0, 0, -2)}, r"seq_starts\[2\] must be at least 0, got -2"),
    "scale_nan": ({"sm_scale": float("nan")}, r"sm_scale must be finite.*, got nan"),
    "scale_inf": ({"sm_scale": float("inf")}, r"sm_scale must be finite.*, got inf"),
    "scale_huge": ({"sm_scale": 1e300}, r"sm_scale must be finite.*, got 1e\+300"),
    "scale_text": ({"sm_scale": "1"}, r"sm_scale must be .*, got '1'"),
    "window_zero": ({"sliding_window": 0}, r"sliding_window must be at least 1.*, got 0"),
    "window_negative": ({"sliding_window": -5}, r"sliding_window must be at least 1.*, got -5"),
    "window_float": ({"sliding_window": 2.5}, r"sliding_window must be an int or None, got 2.5"),
    "window_huge": ({"sliding_window": 2**40}, r"sliding_window must be .*, got 1099511627776"),
    "cap_zero": ({"logits_soft_cap": 0.0}, r"logits_soft_cap must be positive.*, got 0"),
    "cap_negative": ({"logits_soft_cap": -1.0}, r"logits_soft_cap must be positive.*, got -1"),
    "cap_nan": ({"logits_soft_cap": float("nan")}, r"logits_soft_cap must be .*, got nan"),
    "splits_zero": ({"num_splits": 0}, r"num_splits must be at least 1.*, got 0"),
    "splits_negative": ({"num_splits": -3}, r"num_splits must be at least 1.*, got -3"),
    "splits_bool": ({"num_splits": True}, r"num_splits must be an int or None, got True"),
    "scale_bool": ({"sm_scale": True}, r"sm_scale must be a Python float or None, got True"),
    "scale_tensor": ({"sm_scale": torch.tensor(0.1)}, r"sm_scale must be a Python float or None, got tensor\(0.1000\)"),
    "splits_and_invariant": ({"num_splits": 2, "batch_invariant": True}, r"num_splits must be None with batch_invariant=True.*, got 2"),
    "invariant_int": ({"batch_invariant": 1}, r"batch_invariant must be True or False, got 1"),
    "slopes_dtype": ({"alibi_slopes": torch.zeros(HQ, dtype=torch.float64)}, r"alibi_slopes must be float32, got float64"),
    "slopes_shape": ({"alibi_slopes": torch.zeros(HKV)}, r"alibi_slopes must have shape .*, got \[2\]"),
    "slopes_rows": ({"alibi_slopes": torch.zeros(2, HQ)}, r"alibi_slopes must have shape .*, got \[2, 4\]"),
    "sinks_dtype": ({"sinks": torch.zeros(HQ, dtype=torch.float16)}, r"sinks must be float32, got float16"),
    "sinks_shape": ({"sinks": torch.zeros(B, HQ)}, r"sinks must have shape .*, got \[3, 4\]"),
    "out_dtype": ({"out": torch.zeros(B, HQ, D, dtype=torch.float16)}, r"out must be float32, got float16"),
    "out_shape": ({"out": torch.zeros(B, HQ, 32)}, r"out must have the shape of q, \[3, 4, 64\], got \[3, 4, 32\]"),
    "out_stride": ({"out": torch.zeros(B, HQ, 2 * D)[..., ::2]}, r"out must be contiguous in its last dimension .* got stride 2"),
    "out_expanded": ({"out": torch.zeros(1, HQ, D).expand(B, HQ, D)}, r"out must .*"),
    "cache_none": ({"cache": None}, r"cache must be a .*KVCache, got NoneType"),
    "cache_tensor": ({"cache": torch.zeros(1)}, r"cache must be a .*KVCache, got Tensor"),
}  # fmt: skip


def call(arguments):
    arguments = dict(arguments)
    return decode_attention(arguments.pop("q"), arguments.pop("cache"), **arguments)


@pytest.mark.parametrize("name", BAD_DECODE)
def test_decode_attention_refuses(name):
    """Who, rule, value; and `out` keeps its bytes."""
    change, message = BAD_DECODE[name]
    arguments = good_arguments() | change
    out_before = None if arguments["out"] is None else arguments["out"].clone()
    with pytest.raises((ValueError, UnsupportedError), match=r"^decode_attention: " + message):
        call(arguments)
    assert out_before is None or torch.equal(arguments["out"], out_before)


def test_the_unbroken_call_works():
    out = good_arguments()["out"]
    assert call(good_arguments() | {"out": out}) is out
    assert not (out == 7).any()


def test_an_unknown_keyword_is_an_error():
    with pytest.raises(TypeError, match="window_size"):
        call(good_arguments() | {"window_size": 3})


def test_output_must_not_overlap_an_input():
    arguments = good_arguments()
    with pytest.raises(ValueError, match=r"^decode_attention: out must not share memory with q, got .*"):
        call(arguments | {"out": arguments["q"]})


def test_a_cache_must_not_be_its_own_input_or_output():
    """The message tells the cache's tensor from the argument of the same name."""
    cache = KVCache.allocate(4, 4, 4, 64, kv_format="fp16")
    with pytest.raises(ValueError, match=r"^append_kv: v must not share memory with the cache's v, got .*"):
        cache.append(torch.zeros(4, 4, 64, dtype=torch.float16), cache.v[1], torch.arange(4))
    with pytest.raises(ValueError, match=r"^decode_attention: out must not share memory with the cache's k, got .*"):
        q = torch.zeros(4, 4, 64, dtype=torch.float16)
        decode_attention(q, cache, seq_lens=ints(1, 1, 1, 1), out=cache.k[:, 0])


def test_unsupported_head_dims_name_what_there_is():
    for head_dim in (8, 24, 36, 46, 260, 512):
        cache = KVCache.allocate(1, 8, 1, head_dim, kv_format="fp16")
        with pytest.raises(UnsupportedError, match=rf"no kernel for head_dim {head_dim} and kv_format fp16.*32.*256"):
            decode_attention(torch.zeros(1, 1, head_dim), cache, seq_lens=ints(3))


def test_a_cuda_device_without_the_backend_is_unsupported():
    if "cuda" in pyquantattn.available_backends():
        pytest.skip("this build has the CUDA backend")
    assert not pyquantattn.supports(kv_format="int8", head_dim=64, device="cuda")


BAD_ALLOCATE = {
    "format": ({"kv_format": "int7"}, r"kv_format must be .*, got .*int7"),
    "pair": ({"kv_format": "int8/fp16"}, r"kv_format must be .*, got .*int8/fp16"),
    "case": ({"kv_format": "INT8"}, r"kv_format must be .*, got .*INT8"),
    "layout": ({"layout": "BHND"}, r"layout must be .*, got .*BHND"),
    "pages": ({"num_pages": -1}, r"num_pages must be .*, got -1"),
    "pages_huge": ({"num_pages": 2**70}, r"num_pages must be .*, got 1180591620717411303424"),
    "device": ({"device": "mars"}, r"device must be a torch.device or its name, got 'mars'"),
    "device_none": ({"device": None}, r"device must be a torch.device or its name, got None"),
    "meta": ({"device": "meta"}, r"k must be a dense tensor in CPU or CUDA memory, got Tensor .*"),
    "gradient": ({"k_scale": torch.ones(2, requires_grad=True), "v_scale": 1.0}, r"k_scale must not require a gradient.*"),
    "page_size": ({"page_size": 0}, r"page_size must be .*, got 0"),
    "heads": ({"num_kv_heads": 0}, r"num_kv_heads must be .*, got 0"),
    "head_dim": ({"head_dim": 0}, r"head_dim must be .*, got 0"),
    "head_dim_text": ({"head_dim": "64"}, r"head_dim must be .*, got .*64"),
    "scale_zero": ({"k_scale": torch.tensor(0.0)}, r"k_scale must be positive and finite, got 0"),
    "scale_negative": ({"v_scale": torch.tensor([0.5, -0.5])}, r"v_scale must be positive and finite, got -0.5"),
    "scale_infinite": ({"k_scale": torch.tensor(torch.inf)}, r"k_scale must be positive and finite, got inf"),
    "scale_nan": ({"v_scale": torch.tensor([0.5, torch.nan])}, r"v_scale must be positive and finite, got nan"),
    "scale_number": ({"k_scale": -1.0}, r"k_scale must be positive and finite in float32, got -1.0"),
    "scale_dtype": ({"k_scale": torch.tensor(0.5, dtype=torch.float64), "v_scale": torch.tensor(0.5)}, r"k_scale must be .*float64"),
    "scale_shape": ({"k_scale": torch.ones(3), "v_scale": torch.ones(3)}, r"k_scale must .*\[3\]"),
    "scale_of_fp16": ({"kv_format": "fp16", "k_scale": torch.ones(2), "v_scale": torch.ones(2)}, r"k_scale must be .*"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ALLOCATE)
def test_allocate_refuses(name):
    change, message = BAD_ALLOCATE[name]
    arguments = {"num_pages": 4, "page_size": 8, "num_kv_heads": 2, "head_dim": 64, "kv_format": "int8"} | change
    with pytest.raises(ValueError, match=r"^KVCache[\w.]*: " + message):
        KVCache.allocate(**arguments)


def one_bad_offset(value):
    offset = torch.zeros(2, 64)
    offset[1, 63] = value
    return offset


INT8_CODES = torch.zeros(4, 8, 2, 64, dtype=torch.int8)
TOKEN_SCALE = torch.ones(4, 8, 2, dtype=torch.float16)
BAD_TENSORS = {
    "f9_uint8": ({"k": INT8_CODES.view(torch.uint8)}, r"k must have .*, got uint8"),
    "f9_pair": ({"k": INT8_CODES.view(torch.float8_e5m2)}, r"k and v must have the dtypes of a pair .*"),
    "f9_float32": ({"v": torch.zeros(4, 8, 2, 64)}, r"v must have .*, got float32"),
    "no_scales": ({"k_scale": None, "v_scale": None}, r"k_scale must be given .*"),
    "no_v_scale": ({"v_scale": None}, r"v_scale must be given .*"),
    "dims": ({"k": INT8_CODES[0]}, r"k must have shape .*, got \[8, 2, 64\]"),
    "different": ({"v": INT8_CODES[:3]}, r"v must have shape .*, got \[3, 8, 2, 64\]"),
    "stride": (
        {"k": torch.zeros(4, 8, 2, 128, dtype=torch.int8)[..., ::2]},
        r"k must be contiguous in its last dimension .*",
    ),
    "scale_shape": ({"k_scale": TOKEN_SCALE[:, :4]}, r"k_scale must .*"),
    "scale_dtype": ({"k_scale": TOKEN_SCALE.float()}, r"k_scale must .*"),
    "head_scale_half": ({"k_scale": torch.ones(2, dtype=torch.float16)}, r"k_scale must .*"),
    "layout": ({"layout": "nhd"}, r"layout must be .*, got .*nhd"),
    "gradient": ({"v": torch.zeros(4, 8, 2, 64, requires_grad=True)}, r"v must not require a gradient.*"),
    "offset_dtype": ({"k_offset": torch.zeros(2, 64, dtype=torch.float16)}, r"k_offset must be float32, got float16"),
    "offset_shape": ({"k_offset": torch.zeros(64)}, r"k_offset must have shape \[H, D\] = \[2, 64\], got \[64\]"),
    "offset_heads": ({"k_offset": torch.zeros(1, 64)}, r"k_offset must have shape \[H, D\] = \[2, 64\], got \[1, 64\]"),
    "offset_dim": ({"k_offset": torch.zeros(2, 32)}, r"k_offset must have shape .*, got \[2, 32\]"),
    "offset_stride": (
        {"k_offset": torch.zeros(2, 128)[:, ::2]},
        r"k_offset must be contiguous in its last dimension \(stride 1\), got stride 2",
    ),
    "offset_number": ({"k_offset": 1.0}, r"k_offset must be a torch.Tensor, got float"),
    "offset_nan": ({"k_offset": one_bad_offset(float("nan"))}, r"k_offset must be finite, got nan"),
    "offset_inf": ({"k_offset": one_bad_offset(float("-inf"))}, r"k_offset must be finite, got -inf"),
    "offset_meta": ({"k_offset": torch.zeros(2, 64, device="meta")}, r"k_offset must .*"),
    "offset_gradient": (
        {"k_offset": torch.zeros(2, 64, requires_grad=True)},
        r"k_offset must not require a gradient.*",
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_from_tensors_refuses(name):
    """F9: dtypes are explicit; storage bytes of another format are not guessed at."""
    change, message = BAD_TENSORS[name]
    arguments = {"k": INT8_CODES, "v": INT8_CODES, "k_scale": TOKEN_SCALE, "v_scale": TOKEN_SCALE} | change
    with pytest.raises((ValueError, UnsupportedError), match=r"^KVCache[\w.]*: " + message):
        KVCache.from_tensors(arguments.pop("k"), arguments.pop("v"), **arguments)


ROWS = torch.randn(3, 2, 64)
BAD_APPEND = {
    "slots_dtype": ((ROWS, ROWS, ints(0, 1, 2)), r"slot_mapping must be int64, got int32"),
    "slots_shape": ((ROWS, ROWS, torch.arange(2)), r"slot_mapping must have shape .*, got \[2\]"),
    "slot_past_the_end": (
        (ROWS, ROWS, torch.tensor([0, 32, 1])),
        r"slot_mapping\[1\] must be -1 or in \[0, 32\), got 32",
    ),
    "slot_negative": ((ROWS, ROWS, torch.tensor([0, 1, -2])), r"slot_mapping\[2\] must be .*, got -2"),
    "slot_huge": ((ROWS, ROWS, torch.tensor([0, 1, 2**62])), r"slot_mapping\[2\] must be .*, got 4611686018427387904"),
    "heads": ((ROWS[:, :1], ROWS[:, :1], torch.arange(3)), r"k must have shape .*, got \[3, 1, 64\]"),
    "head_dim": ((ROWS, ROWS[..., :32], torch.arange(3)), r"v must have shape .*, got \[3, 2, 32\]"),
    "tokens": ((ROWS, ROWS[:2], torch.arange(3)), r"v must have shape .*, got \[2, 2, 64\]"),
    "dtypes": ((ROWS, ROWS.half(), torch.arange(3)), r"v must be float32, got float16"),
    "dtype": ((ROWS.double(), ROWS.double(), torch.arange(3)), r"k must be .*, got float64"),
    "none": ((ROWS, None, torch.arange(3)), r"v must be a torch.Tensor, got NoneType"),
    "negative_view": ((ROWS, torch._neg_view(ROWS), torch.arange(3)), r"v must hold its numbers themselves, got .*"),
}


@pytest.mark.parametrize("name", BAD_APPEND)
def test_append_refuses_and_writes_nothing(name):
    """No partial write: also the good slots before a bad one keep their bytes."""
    arguments, message = BAD_APPEND[name]
    cache = KVCache.allocate(4, 8, 2, 64, kv_format="int8")
    tensors = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(77)
    with pytest.raises(ValueError, match=r"^append\w*: " + message):
        cache.append(*arguments)
    assert all((tensor.view(torch.uint8) == 77).all() for tensor in tensors)


CODES = torch.zeros(2, 2, 64, dtype=torch.int8)
OUT, LSE = torch.zeros(2, 3, 64), torch.zeros(2, 3)
BAD_OTHERS = {
    "quantize_format": (lambda: quantize_kv(ROWS, "int4"), r"quantize_kv: kv_format must be .*, got .*int4"),
    "quantize_pair": (lambda: quantize_kv(ROWS, "fp16/int8"), r"quantize_kv: kv_format must be .*, got .*fp16/int8"),
    "quantize_dtype": (lambda: quantize_kv(ROWS.double(), "int8"), r"quantize_kv: x must be .*, got float64"),
    "quantize_scale": (lambda: quantize_kv(ROWS, "int8", torch.ones(3)), r"quantize_kv: scale must .*, got \[3\]"),
    "quantize_fp16_scale": (lambda: quantize_kv(ROWS, "fp16", torch.ones(2)), r"quantize_kv: scale must be None .*"),
    "quantize_none": (lambda: quantize_kv(None, "int8"), r"quantize_kv: x must be a torch.Tensor, got NoneType"),
    "quantize_offset": (lambda: quantize_kv(ROWS, "int8", offset=torch.ones(2)), r"quantize_kv: offset must have shape \[H, D\] = \[2, 64\], got \[2\]"),
    "quantize_offset_nan": (lambda: quantize_kv(ROWS, "int8", offset=one_bad_offset(float("nan"))), r"quantize_kv: offset must be finite, got nan"),
    "dequantize_offset": (lambda: dequantize_kv(CODES, 1.0, offset=torch.ones(2, 64).double()), r"dequantize_kv: offset must be float32, got float64"),
    "estimate_dtype": (lambda: estimate_k_offset(ROWS.double()), r"estimate_k_offset: k must be float32, float16 or bfloat16, got torch.float64"),
    "estimate_shape": (lambda: estimate_k_offset(ROWS[0]), r"estimate_k_offset: k must have shape \[..., H, D\] and some tokens, got \[2, 64\]"),
    "estimate_empty": (lambda: estimate_k_offset(ROWS[:0]), r"estimate_k_offset: k must have shape .* and some tokens, got \[0, 2, 64\]"),
    "estimate_none": (lambda: estimate_k_offset(None), r"estimate_k_offset: k must be a torch.Tensor, got NoneType"),
    "dequantize_none": (lambda: dequantize_kv(CODES, None), r"dequantize_kv: scale must be given .*"),
    "dequantize_dtype": (lambda: dequantize_kv(CODES.float(), None), r"dequantize_kv: codes must have .*, got float32"),
    "dequantize_scale": (lambda: dequantize_kv(CODES, torch.ones(2, 3, dtype=torch.float16)), r"dequantize_kv: scale must .*"),
    "merge_lse": (lambda: merge_states(OUT, LSE[:1], OUT, LSE), r"merge_states: lse_a must have .*"),
    "merge_out": (lambda: merge_states(OUT, LSE, OUT[:1], LSE), r"merge_states: out_b must have .*"),
    "merge_dtype": (lambda: merge_states(OUT, LSE, OUT.half(), LSE), r"merge_states: out_b must be float32, got float16"),
    "merge_lse_dtype": (lambda: merge_states(OUT, LSE.half(), OUT, LSE), r"merge_states: lse_a must be float32, got float16"),
    "slopes_zero": (lambda: pyquantattn.get_alibi_slopes(0), r"get_alibi_slopes: num_heads must be .*, got 0"),
    "slopes_negative": (lambda: pyquantattn.get_alibi_slopes(-4), r"get_alibi_slopes: num_heads must be .*, got -4"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_OTHERS)
def test_other_operations_refuse(name):
    function, message = BAD_OTHERS[name]
    with pytest.raises(ValueError, match="^" + message):
        function()


def test_every_message_ends_with_what_came():
    """The form that users and tools rely on: who, a colon, the rule, `got`."""
    for change, _ in BAD_DECODE.values():
        with pytest.raises((ValueError, UnsupportedError)) as caught:
            call(good_arguments() | change)
        assert re.match(r"^decode_attention: .+, got .+", str(caught.value)), str(caught.value)
