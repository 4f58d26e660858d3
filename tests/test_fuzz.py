"""Fuzzed arguments, one or several wrong at once.

Whatever comes, a call either works or raises; it never crashes, and a refused call writes nothing."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyquantattn import (
    KVCache,
    UnsupportedError,
    decode_attention,
    dequantize_kv,
    hybrid_attention,
    merge_states,
    prefill_attention,
    quantize_kv,
)

RELAXED = [HealthCheck.too_slow, HealthCheck.data_too_large]
DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64,
    torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
]  # fmt: skip
REFUSALS = (ValueError, UnsupportedError)

shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 64]), max_size=5)


@st.composite
def tensors(draw):
    """Any small tensor: dtype, shape, strides (transposed, sliced, expanded) and values, NaN among them."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(shapes)
    num_bytes = torch.empty((), dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    raw = torch.randint(0, 256, (*shape, num_bytes), dtype=torch.uint8, generator=generator)
    tensor = raw.view(dtype)[..., 0] if dtype is not torch.bool else raw[..., 0] > 127
    kind = draw(st.sampled_from(["plain", "transposed", "sliced", "expanded", "shifted"]))
    if kind == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1)
    if kind == "sliced" and tensor.dim() > 0:
        return tensor[..., ::2]
    if kind == "expanded" and tensor.dim() > 0:
        return tensor[:1].expand(tensor.shape)
    if kind == "shifted" and tensor.dim() > 0:
        return tensor[1:]
    return tensor


strangers = st.one_of(
    tensors(), st.none(), st.integers(-3, 70), st.floats(), st.text(max_size=5), st.booleans(), st.just([1, 2]),
    st.just(2**70), st.just(-(2**63)), st.just(object()),
)  # fmt: skip


def good_cache(kv_format="int8"):
    cache = KVCache.allocate(4, 8, 2, 64, kv_format=kv_format)
    cache.append(torch.ones(32, 2, 64), torch.ones(32, 2, 64), torch.arange(32))
    return cache


def good_keywords():
    return {
        "seq_lens": torch.tensor([5, 0, 17], dtype=torch.int32),
        "page_table": torch.tensor([[0, 1, 2], [3, 3, 3], [2, 1, 0]], dtype=torch.int32),
        "seq_starts": torch.zeros(3, dtype=torch.int32),
        "sm_scale": 0.1,
        "alibi_slopes": torch.ones(4),
        "sliding_window": 7,
        "logits_soft_cap": 5.0,
        "sinks": torch.zeros(4),
        "num_splits": None,
        "batch_invariant": False,
        "out": torch.full((3, 4, 64), 7.0),
        "return_lse": True,
    }


def bytes_of(cache):
    return [t.view(torch.uint8).clone() for t in (cache.k, cache.v, cache.k_scale, cache.v_scale)]


@settings(max_examples=600, deadline=None, suppress_health_check=RELAXED)
@given(changes=st.dictionaries(st.sampled_from([*good_keywords(), "q"]), strangers, min_size=1, max_size=3))
def test_decode_attention_survives_anything(changes):
    arguments = {"q": torch.zeros(3, 4, 64), **good_keywords()} | changes
    cache, out = good_cache(), arguments["out"]
    before = bytes_of(cache)
    given_out = out.clone() if isinstance(out, torch.Tensor) else None
    try:
        result, lse = _both(decode_attention(arguments.pop("q"), cache, **arguments))
        assert result.dim() in (3, 4) and (lse is None or lse.shape == result.shape[:-1])
    except REFUSALS as error:
        assert str(error).startswith("decode_attention: "), error
        if given_out is not None:
            assert out.equal(given_out) or out.isnan().any()
    assert all(a.equal(b) for a, b in zip(bytes_of(cache), before, strict=True))


def good_ragged_keywords():
    """Of three sequences with 5, 0 and 4 query tokens."""
    keywords = good_keywords() | {
        "cu_seqlens_q": torch.tensor([0, 5, 5, 9], dtype=torch.int32),
        "causal": True,
        "out": torch.full((9, 4, 64), 7.0),
    }
    return {"q": torch.zeros(9, 4, 64), **keywords}


def good_prefill_arguments():
    keywords = good_ragged_keywords() | {
        "k": torch.zeros(12, 2, 64),
        "v": torch.zeros(12, 2, 64),
        "cu_seqlens_k": torch.tensor([0, 6, 7, 12], dtype=torch.int32),
    }
    of_caches = ("seq_lens", "page_table", "num_splits", "batch_invariant")
    return {name: value for name, value in keywords.items() if name not in of_caches}


# Cumulative lengths of the right dtype and any contents, which no check of shapes stops.
any_ends = st.lists(st.integers(-3, 14) | st.just(2**31 - 1), min_size=1, max_size=6).map(
    lambda ends: torch.tensor(ends, dtype=torch.int32)
)


def survives(who, call, arguments):
    """A result of the promised shape, or a refusal that says who; a refused call leaves `out` as it was."""
    out = arguments["out"]
    given_out = out.clone() if isinstance(out, torch.Tensor) else None
    try:
        result, lse = _both(call(**arguments))
        assert result.dim() == 3 and (lse is None or lse.shape == result.shape[:-1])
    except REFUSALS as error:
        assert str(error).startswith(f"{who}: "), error
        if given_out is not None:
            assert out.equal(given_out) or out.isnan().any()


@settings(max_examples=600, deadline=None, suppress_health_check=RELAXED)
@given(
    changes=st.dictionaries(st.sampled_from([*good_prefill_arguments()]), strangers, min_size=1, max_size=3),
    ends=st.dictionaries(st.sampled_from(["cu_seqlens_q", "cu_seqlens_k"]), any_ends),
)
def test_prefill_attention_survives_anything(changes, ends):
    survives("prefill_attention", prefill_attention, good_prefill_arguments() | ends | changes)


@settings(max_examples=600, deadline=None, suppress_health_check=RELAXED)
@given(
    changes=st.dictionaries(st.sampled_from([*good_ragged_keywords()]), strangers, min_size=1, max_size=3),
    ends=st.dictionaries(st.sampled_from(["cu_seqlens_q", "seq_lens"]), any_ends),
)
def test_hybrid_attention_survives_anything(changes, ends):
    cache = good_cache()
    before = bytes_of(cache)
    survives("hybrid_attention", hybrid_attention, {"cache": cache, **good_ragged_keywords(), **ends, **changes})
    assert all(a.equal(b) for a, b in zip(bytes_of(cache), before, strict=True))


def _both(result):
    return result if isinstance(result, tuple) else (result, None)


@settings(max_examples=300, deadline=None, suppress_health_check=RELAXED)
@given(k=strangers, v=strangers, slots=strangers, which=st.integers(1, 7))
def test_append_survives_anything(k, v, slots, which):
    good = (torch.ones(3, 2, 64), torch.ones(3, 2, 64), torch.tensor([1, 5, -1]))
    arguments = [bad if which >> i & 1 else ok for i, (bad, ok) in enumerate(zip((k, v, slots), good, strict=True))]
    cache = good_cache()
    before = bytes_of(cache)
    try:
        cache.append(*arguments)
    except REFUSALS as error:
        assert str(error).startswith("append"), error
        assert all(a.equal(b) for a, b in zip(bytes_of(cache), before, strict=True))


@settings(max_examples=400, deadline=None, suppress_health_check=RELAXED)
@given(
    k=strangers, v=strangers, k_scale=strangers, v_scale=strangers, layout=st.sampled_from(["NHD", "HND", "", None, 3])
)
def test_from_tensors_survives_anything(k, v, k_scale, v_scale, layout):
    try:
        cache = KVCache.from_tensors(k, v, k_scale=k_scale, v_scale=v_scale, layout=layout)
    except REFUSALS as error:
        assert str(error).startswith("KVCache"), error
    else:
        assert cache.nbytes >= 0 and cache.k.dim() == 4


@settings(max_examples=400, deadline=None, suppress_health_check=RELAXED)
@given(
    x=strangers,
    kv_format=st.sampled_from(["int8", "fp16", "fp8_e4m3", "fp8_e5m2", "fp16/int8", "x", None, 3]),
    scale=strangers,
)
def test_codecs_survive_anything(x, kv_format, scale):
    for who, call in (
        ("quantize_kv", lambda: quantize_kv(x, kv_format, scale)),
        ("dequantize_kv", lambda: dequantize_kv(x, scale)),
    ):
        try:
            call()
        except REFUSALS as error:
            assert str(error).startswith(f"{who}: "), error


@settings(max_examples=300, deadline=None, suppress_health_check=RELAXED)
@given(st.tuples(strangers, strangers, strangers, strangers), st.integers(1, 15))
def test_merge_states_survives_anything(bad, which):
    good = (torch.zeros(2, 3, 64), torch.zeros(2, 3), torch.zeros(2, 3, 64), torch.zeros(2, 3))
    arguments = [b if which >> i & 1 else g for i, (b, g) in enumerate(zip(bad, good, strict=True))]
    try:
        merge_states(*arguments)
    except REFUSALS as error:
        assert str(error).startswith("merge_states: "), error
