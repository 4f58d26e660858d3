"""Wrong arguments of prefill_attention and hybrid_attention: who, the rule and the value; nothing is written."""

# ruff: noqa: E501 - tables of one line for each wrong argument

import re

import pytest
import torch
from test_bad_input import ints

from pyquantattn import KVCache, UnsupportedError, hybrid_attention, prefill_attention

T, S, HQ, HKV, D, PAGE = 9, 12, 4, 2, 64, 8


def good_prefill():
    """Arguments of a call that works; tests break one of them."""
    return {
        "q": torch.randn(T, HQ, D),
        "k": torch.randn(S, HKV, D),
        "v": torch.randn(S, HKV, D),
        "cu_seqlens_q": ints(0, 5, 5, 9),
        "cu_seqlens_k": ints(0, 6, 7, 12),
        "out": torch.full((T, HQ, D), 7.0),
    }


def good_hybrid():
    cache = KVCache.allocate(8, PAGE, HKV, D, kv_format="int8")
    rows = torch.randn(2, 64, HKV, D)
    cache.append(rows[0], rows[1], torch.arange(64))
    return {
        "q": torch.randn(T, HQ, D),
        "cache": cache,
        "cu_seqlens_q": ints(0, 5, 5, 9),
        "seq_lens": ints(5, 0, 17),
        "page_table": torch.arange(9, dtype=torch.int32).view(3, 3) % 8,
        "out": torch.full((T, HQ, D), 7.0),
    }


def prefill(arguments):
    arguments = dict(arguments)
    return prefill_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def hybrid(arguments):
    arguments = dict(arguments)
    return hybrid_attention(arguments.pop("q"), arguments.pop("cache"), **arguments)


OF_BOTH = {
    "q_dtype": ({"q": torch.zeros(T, HQ, D, dtype=torch.float64)}, r"q must be float32, float16 or bfloat16, got float64"),
    "q_codes": ({"q": torch.zeros(T, HQ, D, dtype=torch.float8_e4m3fn)}, r"q must be .*, got float8_e4m3fn"),
    "q_0d": ({"q": torch.tensor(1.0), "out": None}, r"q must have shape \[T, Hq, D\] = .*, got \[\]"),
    "q_2d": ({"q": torch.zeros(T, D), "out": None}, r"q must have shape \[T, Hq, D\] = .*, got \[9, 64\]"),
    "q_4d": ({"q": torch.zeros(3, 3, HQ, D), "out": None}, r"q must have shape \[T, Hq, D\] = .*, got \[3, 3, 4, 64\]"),
    "q_stride": ({"q": torch.zeros(T, HQ, 2 * D)[..., ::2]}, r"q must be contiguous in its last dimension .* got stride 2"),
    "q_none": ({"q": None}, r"q must be a torch.Tensor, got NoneType"),
    "q_sparse": ({"q": torch.zeros(T, HQ, D).to_sparse()}, r"q must be a dense tensor, got layout torch.sparse_coo"),
    "q_negative_view": ({"q": torch._neg_view(torch.ones(T, HQ, D))}, r"q must hold its numbers themselves, got the negative view"),
    "q_meta": ({"q": torch.zeros(T, HQ, D, device="meta")}, r"q must be .*, got Tensor .*"),
    "q_gradient": ({"q": torch.zeros(T, HQ, D, requires_grad=True)}, r"q must not require a gradient, .*, got requires_grad=True"),
    "heads": ({"q": torch.zeros(T, 5, D), "out": None}, r"num_q_heads must be a multiple of num_kv_heads, got 5 and 2"),
    "zero_heads": ({"q": torch.zeros(T, 0, D), "out": None}, r"num_q_heads must be .*, got 0"),
    "ends_dtype": ({"cu_seqlens_q": torch.tensor([0, 5, 5, 9])}, r"cu_seqlens_q must be int32, got int64"),
    "ends_list": ({"cu_seqlens_q": [0, 5, 5, 9]}, r"cu_seqlens_q must be a torch.Tensor, got list"),
    "ends_none": ({"cu_seqlens_q": None}, r"cu_seqlens_q must be a torch.Tensor, got NoneType"),
    "ends_dims": ({"cu_seqlens_q": ints(0, 5, 5, 9).view(2, 2)}, r"cu_seqlens_q must have shape \[B \+ 1\] = .*, got \[2, 2\]"),
    "ends_empty": ({"cu_seqlens_q": ints()}, r"cu_seqlens_q must have at least 1 entry, got shape \[0\]"),
    "ends_start": ({"cu_seqlens_q": ints(1, 5, 5, 9)}, r"cu_seqlens_q.* must start at 0, got 1"),
    "ends_negative": ({"cu_seqlens_q": ints(-1, 5, 5, 9)}, r"cu_seqlens_q.* must start at 0, got -1"),
    "ends_decrease": ({"cu_seqlens_q": ints(0, 5, 4, 9)}, r"cu_seqlens_q.* must never decrease, got 5 and then 4"),
    "ends_below": ({"cu_seqlens_q": ints(0, 5, -7, 9)}, r"cu_seqlens_q.* must never decrease, got 5 and then -7"),
    "ends_short": ({"cu_seqlens_q": ints(0, 5, 5, 8)}, r"cu_seqlens_q.* must end at .* 9.*, got 8"),
    "ends_long": ({"cu_seqlens_q": ints(0, 5, 5, 10)}, r"cu_seqlens_q.* must end at .* 9.*, got 10"),
    "ends_int_max": ({"cu_seqlens_q": ints(0, 5, 5, 2**31 - 1)}, r"cu_seqlens_q.* must end at .* 9.*, got 2147483647"),
    "starts_dtype": ({"seq_starts": torch.zeros(3)}, r"seq_starts must be int32, got float32"),
    "starts_shape": ({"seq_starts": ints(0)}, r"seq_starts must have shape \[B\] = \[3\], got \[1\]"),
    "starts_negative": ({"seq_starts": ints(0, 0, -2)}, r"seq_starts\[2\] must be at least 0, got -2"),
    "causal_int": ({"causal": 1}, r"causal must be True or False, got 1 of type int"),
    "causal_none": ({"causal": None}, r"causal must be True or False, got None"),
    "lse_int": ({"return_lse": 1}, r"return_lse must be True or False, got 1"),
    "scale_nan": ({"sm_scale": float("nan")}, r"sm_scale must be finite.*, got nan"),
    "scale_huge": ({"sm_scale": 1e300}, r"sm_scale must be finite.*, got 1e\+300"),
    "scale_text": ({"sm_scale": "1"}, r"sm_scale must be .*, got '1'"),
    "scale_tensor": ({"sm_scale": torch.tensor(0.1)}, r"sm_scale must be a Python float or None, got tensor\(0.1000\)"),
    "window_zero": ({"sliding_window": 0}, r"sliding_window must be at least 1.*, got 0"),
    "window_negative": ({"sliding_window": -1}, r"sliding_window must be at least 1.*, got -1"),
    "window_float": ({"sliding_window": 2.5}, r"sliding_window must be an int or None, got 2.5"),
    "window_huge": ({"sliding_window": 2**40}, r"sliding_window must be .*, got 1099511627776"),
    "cap_zero": ({"logits_soft_cap": 0.0}, r"logits_soft_cap must be positive.*, got 0"),
    "cap_nan": ({"logits_soft_cap": float("nan")}, r"logits_soft_cap must be .*, got nan"),
    "slopes_dtype": ({"alibi_slopes": torch.zeros(HQ, dtype=torch.float64)}, r"alibi_slopes must be float32, got float64"),
    "slopes_shape": ({"alibi_slopes": torch.zeros(HKV)}, r"alibi_slopes must have shape .*, got \[2\]"),
    "slopes_rows": ({"alibi_slopes": torch.zeros(T, HQ)}, r"alibi_slopes must have shape \[B, Hq\] = \[3, 4\], got \[9, 4\]"),
    "slopes_gradient": ({"alibi_slopes": torch.zeros(HQ, requires_grad=True)}, r"alibi_slopes must not require a gradient.*"),
    "sinks_dtype": ({"sinks": torch.zeros(HQ, dtype=torch.float16)}, r"sinks must be float32, got float16"),
    "sinks_shape": ({"sinks": torch.zeros(3, HQ)}, r"sinks must have shape \[Hq\] = \[4\], got \[3, 4\]"),
    "out_dtype": ({"out": torch.zeros(T, HQ, D, dtype=torch.float16)}, r"out must be float32, got float16"),
    "out_shape": ({"out": torch.zeros(T, HQ, 32)}, r"out must have the shape of q, \[9, 4, 64\], got \[9, 4, 32\]"),
    "out_stride": ({"out": torch.zeros(T, HQ, 2 * D)[..., ::2]}, r"out must be contiguous in its last dimension .* got stride 2"),
    "out_expanded": ({"out": torch.zeros(1, HQ, D).expand(T, HQ, D)}, r"out must not overlap itself, .*"),
    "out_list": ({"out": [0.0]}, r"out must be a torch.Tensor, got list"),
}  # fmt: skip

OF_PREFILL = OF_BOTH | {
    "k_dtype": ({"k": torch.zeros(S, HKV, D, dtype=torch.float16)}, r"k must be float32, got float16"),
    "v_dtype": ({"v": torch.zeros(S, HKV, D, dtype=torch.bfloat16)}, r"v must be float32, got bfloat16"),
    "k_codes": ({"k": torch.zeros(S, HKV, D, dtype=torch.int8)}, r"k must be float32, got int8"),
    "k_none": ({"k": None}, r"k must be a torch.Tensor, got NoneType"),
    "v_none": ({"v": None}, r"v must be a torch.Tensor, got NoneType"),
    "k_2d": ({"k": torch.zeros(S, D)}, r"k must have shape \[S, H, D\] = .*, got \[12, 64\]"),
    "k_head_dim": ({"k": torch.zeros(S, HKV, 32)}, r"k must have shape \[S, H, D\] = .*, got \[12, 2, 32\]"),
    "v_head_dim": ({"v": torch.zeros(S, HKV, 32)}, r"v must have shape \[S, H, D\] = \[12, 2, 64\], got \[12, 2, 32\]"),
    "v_tokens": ({"v": torch.zeros(S - 1, HKV, D)}, r"v must have shape \[S, H, D\] = \[12, 2, 64\], got \[11, 2, 64\]"),
    "v_heads": ({"v": torch.zeros(S, 1, D)}, r"v must have shape \[S, H, D\] = \[12, 2, 64\], got \[12, 1, 64\]"),
    "no_kv_heads": ({"k": torch.zeros(S, 0, D), "v": torch.zeros(S, 0, D)}, r"num_kv_heads must be at least 1, got 0"),
    "k_stride": ({"k": torch.zeros(S, HKV, 2 * D)[..., ::2]}, r"k must be contiguous in its last dimension .* got stride 2"),
    "v_stride": ({"v": torch.zeros(S, D, HKV).transpose(1, 2)}, r"v must be contiguous in its last dimension .* got stride 2"),
    "v_negative_view": ({"v": torch._neg_view(torch.ones(S, HKV, D))}, r"v must hold its numbers themselves, got the negative view"),
    "k_meta": ({"k": torch.zeros(S, HKV, D, device="meta")}, r"k must be .*, got Tensor .*"),
    "k_gradient": ({"k": torch.zeros(S, HKV, D, requires_grad=True)}, r"k must not require a gradient.*"),
    "v_gradient": ({"v": torch.zeros(S, HKV, D, requires_grad=True)}, r"v must not require a gradient.*"),
    "keys_dtype": ({"cu_seqlens_k": torch.tensor([0, 6, 7, 12])}, r"cu_seqlens_k must be int32, got int64"),
    "keys_shape": ({"cu_seqlens_k": ints(0, 6, 12)}, r"cu_seqlens_k must have shape \[B \+ 1\] = \[4\], got \[3\]"),
    "keys_start": ({"cu_seqlens_k": ints(2, 6, 7, 12)}, r"cu_seqlens_k.* must start at 0, got 2"),
    "keys_decrease": ({"cu_seqlens_k": ints(0, 6, 5, 12)}, r"cu_seqlens_k.* must never decrease, got 6 and then 5"),
    "keys_end": ({"cu_seqlens_k": ints(0, 6, 7, 13)}, r"cu_seqlens_k.* must end at .* 12.*, got 13"),
    "keys_of_queries": ({"cu_seqlens_k": None}, r"cu_seqlens_k.* must end at .* 12.*, got 9"),
    "empty_batch": ({"cu_seqlens_q": ints(0), "cu_seqlens_k": ints(0)}, r"q must have no tokens for an empty batch, got 9"),
    "empty_batch_keys": (
        {"q": torch.zeros(0, HQ, D), "out": None, "cu_seqlens_q": ints(0), "cu_seqlens_k": ints(0)},
        r"k must have no tokens for an empty batch, got 12",
    ),
    "empty_batch_start": (
        {"q": torch.zeros(0, HQ, D), "k": torch.zeros(0, HKV, D), "v": torch.zeros(0, HKV, D), "out": None, "cu_seqlens_q": ints(0), "cu_seqlens_k": ints(5)},
        r"cu_seqlens_k must start at 0, got 5",
    ),
}  # fmt: skip

OF_HYBRID = OF_BOTH | {
    "q_head_dim": ({"q": torch.zeros(T, HQ, 32), "out": None}, r"q must have shape \[T, Hq, D\] = .*, got \[9, 4, 32\]"),
    "cache_none": ({"cache": None}, r"cache must be a KVCache, got NoneType"),
    "cache_tensor": ({"cache": torch.zeros(1)}, r"cache must be a KVCache, got Tensor"),
    "lens_dtype": ({"seq_lens": torch.tensor([5, 0, 17])}, r"seq_lens must be int32, got int64"),
    "lens_shape": ({"seq_lens": ints(5, 0)}, r"seq_lens must have shape \[B\] = \[3\], got \[2\]"),
    "lens_none": ({"seq_lens": None}, r"seq_lens must be a torch.Tensor, got NoneType"),
    "lens_negative": ({"seq_lens": ints(5, -1, 17)}, r"seq_lens\[1\] must be in \[0, 24\] .*, got -1"),
    "lens_long": ({"seq_lens": ints(5, 0, 25)}, r"seq_lens\[2\] must be in \[0, 24\] .*, got 25"),
    "table_dtype": ({"page_table": torch.zeros(3, 3, dtype=torch.int64)}, r"page_table must be int32, got int64"),
    "table_shape": ({"page_table": ints(0, 1, 2)}, r"page_table must have shape .*, got \[3\]"),
    "table_batch": ({"page_table": torch.zeros(2, 3, dtype=torch.int32)}, r"page_table must have shape .*, got \[2, 3\]"),
    "table_page": ({"page_table": torch.arange(9, dtype=torch.int32).view(3, 3)}, r"page_table\[2, 2\] must be in \[0, 8\), got 8"),
    "table_minus": ({"page_table": ints(-1, 1, 2, 3, 4, 5, 6, 7, 0).view(3, 3)}, r"page_table\[0, 0\] must be in .*, got -1"),
    "no_table": ({"page_table": None, "seq_lens": ints(5, 0, 9)}, r"seq_lens\[2\] must be in \[0, 8\] .*, got 9"),
    "no_table_few_pages": (
        {"page_table": None, "cache": KVCache.allocate(2, PAGE, HKV, D), "seq_lens": ints(5, 0, 0)},
        r"without page_table sequence b owns page b, .*, got 2 pages for batch_size 3",
    ),
    "splits_zero": ({"num_splits": 0}, r"num_splits must be at least 1.*, got 0"),
    "splits_bool": ({"num_splits": True}, r"num_splits must be an int or None, got True"),
    "splits_and_invariant": ({"num_splits": 2, "batch_invariant": True}, r"num_splits must be None with batch_invariant=True.*, got 2"),
    "invariant_int": ({"batch_invariant": 1}, r"batch_invariant must be True or False, got 1"),
    "empty_batch": ({"cu_seqlens_q": ints(0), "seq_lens": ints(), "page_table": None}, r"q must have no tokens for an empty batch, got 9"),
    "empty_batch_start": (
        {"q": torch.zeros(0, HQ, D), "out": None, "cu_seqlens_q": ints(5), "seq_lens": ints(), "page_table": None},
        r"cu_seqlens_q must start at 0, got 5",
    ),
}  # fmt: skip

TABLES = {
    "prefill_attention": (prefill, good_prefill, OF_PREFILL),
    "hybrid_attention": (hybrid, good_hybrid, OF_HYBRID),
}


@pytest.mark.parametrize("who,name", [(who, name) for who, (_, _, table) in TABLES.items() for name in table])
def test_a_wrong_argument_is_refused(who, name):
    """Who, rule, value; and `out` keeps its bytes."""
    call, good, table = TABLES[who]
    change, message = table[name]
    arguments = good() | change
    out = arguments["out"]
    before = out.clone() if torch.is_tensor(out) else None
    with pytest.raises((ValueError, UnsupportedError), match=rf"^{who}: {message}") as caught:
        call(arguments)
    assert re.match(rf"^{who}: .+, got .+", str(caught.value)), str(caught.value)
    assert before is None or torch.equal(out, before)


@pytest.mark.parametrize("who", TABLES)
def test_the_unbroken_call_works(who):
    call, good, _ = TABLES[who]
    arguments = good()
    assert call(arguments) is arguments["out"]
    assert torch.isfinite(arguments["out"]).all() and not (arguments["out"] == 7).any()


@pytest.mark.parametrize("who", TABLES)
def test_an_unknown_keyword_is_an_error(who):
    call, good, _ = TABLES[who]
    for unknown in ("window_size", "is_causal", "max_seqlen_q", "dropout_p"):
        with pytest.raises(TypeError, match=unknown):
            call(good() | {unknown: 0})


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_the_output_of_prefill_must_not_overlap_an_input(name):
    arguments = good_prefill() | {"cu_seqlens_k": ints(0, 4, 4, 9)}
    arguments |= {"q": torch.zeros(9, 2, D), "k": torch.zeros(9, 2, D), "v": torch.zeros(9, 2, D)}
    with pytest.raises(ValueError, match=rf"^prefill_attention: out must not share memory with {name}, got .*"):
        prefill(arguments | {"out": arguments[name]})


def test_the_output_of_hybrid_must_not_overlap_an_input():
    arguments = good_hybrid()
    with pytest.raises(ValueError, match=r"^hybrid_attention: out must not share memory with q, got .*"):
        hybrid(arguments | {"out": arguments["q"]})
    cache = KVCache.allocate(4, 4, 4, 64, kv_format="fp16")
    q, ones = torch.zeros(4, 4, 64, dtype=torch.float16), ints(1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"^hybrid_attention: out must not share memory with the cache's k, got .*"):
        hybrid_attention(q, cache, cu_seqlens_q=ints(0, 1, 2, 3, 4), seq_lens=ones, out=cache.k[:, 0])


def test_a_resized_cache_is_refused():
    arguments = good_hybrid()
    arguments["cache"].k.resize_(80, PAGE, HKV, D)
    with pytest.raises(ValueError, match=r"^hybrid_attention: the cache's k must stay where it was .*, got address .*"):
        hybrid(arguments)


@pytest.mark.parametrize("head_dim", [8, 24, 36, 46, 260, 512])
def test_unsupported_head_dims_name_what_there_is(head_dim):
    q, ends = torch.zeros(3, 1, head_dim), ints(0, 3)
    with pytest.raises(UnsupportedError, match=rf"^prefill_attention: no kernel for head_dim {head_dim} .*32.*256"):
        prefill_attention(q, q, q, cu_seqlens_q=ends)
    cache = KVCache.allocate(1, 8, 1, head_dim, kv_format="fp16")
    with pytest.raises(UnsupportedError, match=rf"^hybrid_attention: no kernel for head_dim {head_dim} .*32.*256"):
        hybrid_attention(q, cache, cu_seqlens_q=ends, seq_lens=ints(3))


def test_a_device_without_kernels_is_unsupported(cuda):
    """A clear sentence, and no fallback to the CPU."""
    from pyquantattn import supports

    if supports("int8", 64, operation="hybrid_attention", device=cuda):
        pytest.skip("this build has CUDA kernels for hybrid_attention")
    arguments = {name: x.to(cuda) if torch.is_tensor(x) else x for name, x in good_prefill().items()}
    with pytest.raises(UnsupportedError, match=r"^prefill_attention: .*CUDA.*, got .*"):
        prefill(arguments)
    cache = KVCache.allocate(8, PAGE, HKV, D, device=cuda)
    arguments = {name: x.to(cuda) if torch.is_tensor(x) else x for name, x in good_hybrid().items()}
    with pytest.raises(UnsupportedError, match=r"^hybrid_attention: .*CUDA.*, got .*"):
        hybrid(arguments | {"cache": cache})
