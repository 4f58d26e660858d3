"""Hypothesis: any shape, stride, length and page table gives the reference's answer."""

import numpy as np
import oracle
import torch
from bridge import bits_of_tensor, check, tensor_of_values, values_of_tensor
from cases import Case, make_problem, round_to
from comparison import assert_same_bits
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ragged import (
    FORMAT_OF_DTYPE,
    RaggedCase,
    assert_same_results,
    check_hybrid,
    check_prefill,
    has_prefill_of,
    make_hybrid_problem,
    make_prefill_problem,
)
from test_chunks import Sequences
from test_layout import moved, noise_like

import pyquantattn

PAIRS = ["fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2", "fp16/int8", "bf16/int8", "fp16/fp8_e4m3", "int8/fp8_e4m3"]
DTYPES = ["float32", "float16", "bfloat16"]
# A pytest fixture is shared by the examples of a test: `device` is a constant, so that is fine.
RELAXED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

cases = st.builds(
    Case,
    seq_lens=st.lists(st.one_of(st.integers(0, 40), st.integers(0, 300)), min_size=1, max_size=5).map(tuple),
    kv_format=st.sampled_from(PAIRS),
    scales=st.sampled_from(["token_head", "head", "tensor"]),
    q_dtype=st.sampled_from(DTYPES),
    num_q_tokens=st.integers(1, 16),
    num_kv_heads=st.integers(1, 4),
    group=st.integers(1, 9),
    head_dim=st.integers(4, 32).map(lambda n: 8 * n),
    page_size=st.one_of(st.none(), st.integers(1, 70)),
    layout=st.sampled_from(["NHD", "HND"]),
    alibi=st.sampled_from([None, "heads", "rows"]),
    sliding_window=st.one_of(st.none(), st.integers(1, 320)),
    logits_soft_cap=st.one_of(st.none(), st.floats(0.5, 50)),
    has_sinks=st.booleans(),
    has_starts=st.booleans(),
    sm_scale=st.one_of(st.none(), st.floats(-0.3, 0.3)),
    key_offset=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 2**32 - 1),
)


@settings(max_examples=120, deadline=None, suppress_health_check=RELAXED)
@given(case=cases, num_splits=st.one_of(st.none(), st.integers(1, 40)), batch_invariant=st.booleans())
def test_any_decoding_problem_matches_the_reference(device, case, num_splits, batch_invariant):
    options = {"batch_invariant": True} if batch_invariant else {"num_splits": num_splits}
    check(make_problem(case), device, **options)


@st.composite
def ragged_cases(draw):
    """Any lengths of keys and queries: shorter, equal, longer, none."""
    lengths = st.one_of(st.integers(0, 20), st.integers(0, 150))
    pairs = draw(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=5))
    return RaggedCase(
        seq_lens=tuple(keys for keys, _ in pairs),
        q_lens=draw(st.one_of(st.none(), st.just(tuple(queries for _, queries in pairs)))),
        causal=draw(st.booleans()),
        kv_format=draw(st.sampled_from(PAIRS)),
        scales=draw(st.sampled_from(["token_head", "head", "tensor"])),
        q_dtype=draw(st.sampled_from(DTYPES)),
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 6)),
        head_dim=8 * draw(st.integers(4, 32)),
        page_size=draw(st.one_of(st.none(), st.integers(1, 70))),
        layout=draw(st.sampled_from(["NHD", "HND"])),
        alibi=draw(st.sampled_from([None, "heads", "rows"])),
        sliding_window=draw(st.one_of(st.none(), st.integers(1, 160))),
        logits_soft_cap=draw(st.one_of(st.none(), st.floats(0.5, 50))),
        has_sinks=draw(st.booleans()),
        has_starts=draw(st.booleans()),
        sm_scale=draw(st.one_of(st.none(), st.floats(-0.3, 0.3))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@settings(max_examples=80, deadline=None, suppress_health_check=RELAXED)
@given(case=ragged_cases())
def test_any_prompts_match_the_reference(prefill_device, case):
    assume(has_prefill_of(case.q_dtype, prefill_device))
    check_prefill(make_prefill_problem(case), prefill_device)


@settings(max_examples=80, deadline=None, suppress_health_check=RELAXED)
@given(case=ragged_cases(), num_splits=st.one_of(st.none(), st.integers(1, 40)), batch_invariant=st.booleans())
def test_any_hybrid_batch_matches_the_reference(hybrid_device, case, num_splits, batch_invariant):
    options = {"batch_invariant": True} if batch_invariant else {"num_splits": num_splits}
    check_hybrid(make_hybrid_problem(case), hybrid_device, **options)


@settings(max_examples=40, deadline=None, suppress_health_check=RELAXED)
@given(
    lens=st.lists(st.integers(0, 90), min_size=1, max_size=4).map(lambda lens: (*lens, 1)),
    kv_format=st.sampled_from(PAIRS),
    page_size=st.integers(1, 40),
    steps=st.lists(st.lists(st.integers(0, 40), min_size=5, max_size=5), max_size=6),
    seed=st.integers(0, 1000),
)
def test_any_chunking_gives_the_results_and_bytes_of_whole_prompts(
    hybrid_device, lens, kv_format, page_size, steps, seed
):
    """Each sequence advances by any number of tokens at each step."""
    chunked, whole = (Sequences(lens, kv_format, hybrid_device, page_size, seed) for _ in range(2))
    for counts in steps:
        left = [n - done for n, done in zip(lens, chunked.done, strict=True)]
        chunked.step([min(count, rest) for count, rest in zip(counts, left, strict=False)])
    chunked.run(64).check()
    whole.run(max(lens))
    assert all(torch.equal(a, b) for a, b in zip(chunked.cache_bytes(), whole.cache_bytes(), strict=True))


@settings(max_examples=60, deadline=None, suppress_health_check=RELAXED)
@given(
    shape=st.tuples(st.integers(0, 40), st.integers(1, 3), st.integers(4, 12).map(lambda n: 8 * n)),
    gaps=st.tuples(st.integers(0, 3), st.integers(0, 17)),
    order=st.permutations([0, 1]),
    every=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
)
def test_any_strides_give_the_same_results(prefill_device, shape, gaps, order, every, dtype, causal):
    """Tokens and heads in either order in memory, with gaps of any size, and every second or third token."""
    assume(has_prefill_of(dtype, prefill_device))
    x = torch.randn(3, *shape, device=prefill_device).to(getattr(torch, dtype))
    ends = torch.tensor([0, shape[0] // 2, shape[0]], dtype=torch.int32, device=prefill_device)

    def spread(tensor):
        sizes = (every * tensor.shape[0], tensor.shape[1] + gaps[0])
        wide = noise_like((sizes[order[0]], sizes[order[1]], tensor.shape[2] + gaps[1]), x.dtype, tensor.device)
        wide = wide if order[0] == 0 else wide.transpose(0, 1)
        return moved(tensor, lambda _: wide[::every, : tensor.shape[1], gaps[1] :])

    given = {"cu_seqlens_q": ends, "causal": causal, "return_lse": True}
    expected = pyquantattn.prefill_attention(*x, **given)
    result = pyquantattn.prefill_attention(*map(spread, x), out=spread(x[0]), **given)
    assert_same_results(result, expected, FORMAT_OF_DTYPE[dtype], prefill_device, dtype)


@settings(max_examples=80, deadline=None, suppress_health_check=RELAXED)
@given(
    kv_format=st.sampled_from(["fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2"]),
    dtype=st.sampled_from(DTYPES),
    num_tokens=st.integers(0, 20),
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 260),
    exponent=st.integers(-12, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_vector_is_encoded_like_the_reference(
    device, kv_format, dtype, num_tokens, heads, head_dim, exponent, seed
):
    """Any head_dim, also those that no decoding kernel takes, and any magnitude."""
    x = np.random.default_rng(seed).normal(size=(num_tokens, heads, head_dim)) * 10.0**exponent
    x = round_to(np.clip(x, -3e4, 3e4) if dtype == "float16" else x, dtype)
    codes, scale = pyquantattn.quantize_kv(tensor_of_values(x, dtype, device), kv_format)
    fmt = oracle.FORMATS[kv_format]
    expected, expected_scale = oracle.quantize(x.astype(np.float32), fmt)
    assert_same_bits(bits_of_tensor(codes), expected.view(np.dtype(f"u{fmt.code_bytes}")), "codes")
    if fmt.has_scale:
        assert_same_bits(values_of_tensor(scale), expected_scale, "scale")
    decoded = values_of_tensor(pyquantattn.dequantize_kv(codes, scale))
    np.testing.assert_array_equal(decoded, oracle.dequantize(expected, fmt, expected_scale).astype(np.float32))


@settings(max_examples=60, deadline=None, suppress_health_check=RELAXED)
@given(
    slots=st.lists(st.integers(-1, 23), max_size=30, unique_by=lambda s: s if s >= 0 else object()),
    layout=st.sampled_from(["NHD", "HND"]),
    kv_format=st.sampled_from(PAIRS),
    seed=st.integers(0, 1000),
)
def test_any_slot_mapping_writes_its_slots_and_no_other(device, slots, layout, kv_format, seed):
    torch.manual_seed(seed)
    cache = pyquantattn.KVCache.allocate(4, 6, 2, 40, kv_format=kv_format, device=device, layout=layout)
    rows = torch.randn(2, len(slots), 2, 40, device=device)
    cache.append(rows[0], rows[1], torch.tensor(slots, dtype=torch.int64, device=device))
    k, v = (x if layout == "NHD" else x.transpose(1, 2) for x in cache.dequantize())
    k, v = k.reshape(24, 2, 40), v.reshape(24, 2, 40)
    empty = [s for s in range(24) if s not in slots]
    assert (k[empty] == 0).all() and (v[empty] == 0).all()
    for x, fmt, stored in zip(rows.cpu().numpy(), oracle.split_pair(kv_format), (k, v), strict=True):
        codes, scale = oracle.quantize(x, fmt)
        expected = oracle.dequantize(codes, fmt, scale).astype(np.float32)
        for token, slot in enumerate(slots):
            if slot >= 0:
                np.testing.assert_array_equal(stored[slot].cpu().numpy(), expected[token])
