"""decode_attention equals the float64 reference over shapes, formats and dtypes."""

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from bridge import check, decode_arrays, keywords, make_cache, query_tensor
from cases import Case, make_problem
from comparison import assert_close

import pyquantattn

PAIRS = ["fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2", "fp16/int8", "bf16/int8", "fp16/fp8_e4m3", "bf16/fp8_e4m3"]
PAIRS.append("int8/fp8_e4m3")
EVERYTHING = Case(
    seq_lens=(70, 3, 0, 33),
    num_q_tokens=2,
    alibi="rows",
    sliding_window=21,
    logits_soft_cap=6.0,
    has_sinks=True,
    has_starts=True,
    sm_scale=0.2,
)


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("q_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kv_format", PAIRS)
def test_decode_matches_float64_reference(kv_format, q_dtype, head_dim, device):
    check(make_problem(Case(kv_format=kv_format, q_dtype=q_dtype, head_dim=head_dim)), device)


@pytest.mark.parametrize("scales", ["head", "tensor"])
@pytest.mark.parametrize("kv_format", [pair for pair in PAIRS if pair not in ("fp16", "bf16")])
def test_static_scales(kv_format, scales, device):
    check(make_problem(Case(kv_format=kv_format, scales=scales, seed=1)), device)


@pytest.mark.parametrize("kv_format", PAIRS)
@pytest.mark.parametrize("page_size", [16, None])
def test_all_features_together(kv_format, page_size, device):
    check(make_problem(replace(EVERYTHING, kv_format=kv_format, page_size=page_size)), device)


@pytest.mark.parametrize("head_dim", range(32, 257, 8))
@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e4m3"])
def test_c4_every_head_dim_that_is_supported(kv_format, head_dim, device):
    """C4: no head_dim is padded wrongly; one without a kernel is a clean error."""
    if not pyquantattn.supports(kv_format=kv_format, head_dim=head_dim, device=device):
        with pytest.raises(pyquantattn.UnsupportedError, match=f"head_dim {head_dim}"):
            decode_arrays(make_problem(Case(kv_format=kv_format, head_dim=head_dim)), device)
        return
    check(make_problem(Case(kv_format=kv_format, head_dim=head_dim, seed=head_dim)), device)


@pytest.mark.parametrize("head_dim", range(32, 257, 8))
def test_cpu_supports_every_multiple_of_eight(head_dim):
    for kv_format in PAIRS:
        assert pyquantattn.supports(kv_format=kv_format, head_dim=head_dim, device="cpu")


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24, 40, 64, 71, 128])
@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e4m3"])
def test_c5_f8_every_group_size(kv_format, group, device):
    """C5, F8: heads of a group that is larger than a tile, or no multiple of it, do not bleed."""
    case = Case(kv_format=kv_format, group=group, num_kv_heads=1 if group == 128 else 3, seq_lens=(19, 0, 145, 8))
    check(make_problem(case), device)


@pytest.mark.parametrize("num_q_heads,num_kv_heads", [(12, 4), (20, 5), (28, 4), (40, 8), (71, 71), (71, 1)])
def test_f8_head_counts_of_real_models(num_q_heads, num_kv_heads, device):
    """F8: head counts that are not powers of two."""
    case = Case(num_kv_heads=num_kv_heads, group=num_q_heads // num_kv_heads, seq_lens=(5, 40, 23))
    check(make_problem(case), device)


@pytest.mark.parametrize("kv_format", ["fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("group", [1, 5, 8])
def test_c5_constants_per_kv_head_do_not_bleed(group, kv_format, device):
    """C5: V of KV head h is the constant h + 1, so each output names the head that it read."""
    problem = make_problem(Case(kv_format=kv_format, num_kv_heads=4, group=group, scales="head", seq_lens=(9, 33, 17)))
    fmt = oracle.FORMATS[kv_format]
    constants = np.arange(1.0, 5.0)
    ones = oracle.codecs.encode(np.ones(problem.v_codes.shape) * constants[:, None], fmt)
    problem.v_codes = ones
    if fmt.has_scale:
        problem.v_scale = np.array([1.0, 0.5, 2.0, 0.25], np.float32)
    out, _ = decode_arrays(problem, device)
    scale = np.ones(4) if problem.v_scale is None else problem.v_scale
    expected = np.repeat(constants * scale, group)[None, None, :, None] * np.ones(out.shape)
    assert_close(out, expected, relative=2e-3)


@pytest.mark.parametrize("kv_format", ["int8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("group", [1, 4])
def test_c6_scales_belong_to_their_kv_head(group, kv_format, device):
    """C6: scale[b, h] = 1 + 0.1 h + 0.01 b and V constant: a scale of another head or sequence shows at once."""
    problem = make_problem(Case(kv_format=kv_format, num_kv_heads=6, group=group, page_size=None, seq_lens=(9, 33, 17)))
    fmt = oracle.FORMATS[kv_format]
    num_pages, page_size = problem.v_codes.shape[:2]
    per_head = 1 + 0.1 * np.arange(6) + 0.01 * np.arange(num_pages)[:, None]
    problem.v_scale = (
        np.broadcast_to(per_head[:, None, :], (num_pages, page_size, 6)).astype(np.float16).astype(np.float64)
    )
    problem.v_codes = oracle.codecs.encode(np.ones(problem.v_codes.shape), fmt)
    out, _ = decode_arrays(problem, device)
    expected = np.repeat(problem.v_scale[:3, :1], group, axis=2)[..., None] * np.ones(out.shape)
    assert_close(out, expected, relative=1e-3)


@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("num_q_tokens", [1, 2, 3, 5, 8, 11, 16])
def test_e1_every_number_of_query_tokens(num_q_tokens, kv_format, device):
    """E1: causal order is bottom-right aligned, also where there are more query tokens than keys."""
    case = Case(kv_format=kv_format, num_q_tokens=num_q_tokens, seq_lens=(40, 0, 3, 17, num_q_tokens))
    check(make_problem(case), device)


def test_e1_several_tokens_equal_single_steps(device):
    """E1: token i of n equals a step of its own at length L - n + i + 1."""
    n = 5
    problem = make_problem(Case(num_q_tokens=n, seq_lens=(40, 9, 23), q_dtype="float32"))
    whole, _ = decode_arrays(problem, device)
    for i in range(n):
        single = replace(problem.case, num_q_tokens=1)
        step = replace(problem, case=single, q=problem.q[:, i : i + 1], seq_lens=problem.seq_lens - (n - 1 - i))
        out, _ = decode_arrays(step, device)
        assert_close(out[:, 0], whole[:, i], relative=1e-3)


@by_name(
    [
        Case(layout=layout, page_size=p, kv_format=f)
        for layout in ("NHD", "HND")
        for p in (1, 3, 16, None)
        for f in ("fp16", "int8")
    ]
)
def test_layouts_and_page_sizes(case, device):
    check(make_problem(case), device)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 16, 64])
@pytest.mark.parametrize("kv_format", ["fp16", "int8", "fp8_e5m2"])
def test_c7_splits_with_several_tokens_and_sequences(kv_format, num_splits, device):
    """C7: partial results return to their own sequence and token."""
    case = Case(kv_format=kv_format, num_q_tokens=3, seq_lens=(300, 5, 0, 129), num_kv_heads=3)
    check(make_problem(case), device, num_splits=num_splits)


@pytest.mark.parametrize("kv_format", PAIRS)
def test_batch_invariant_mode_is_as_exact(kv_format, device):
    check(make_problem(Case(kv_format=kv_format, seq_lens=(300, 5, 0, 129))), device, batch_invariant=True)


def test_output_is_written_in_place_and_returned(device):
    problem = make_problem(Case())
    q, cache = query_tensor(problem, device), make_cache(problem, device)
    out = torch.full_like(q, float("nan"))
    returned = pyquantattn.decode_attention(q, cache, out=out, **keywords(problem, device))
    assert returned is out or returned.data_ptr() == out.data_ptr()
    assert torch.equal(out, pyquantattn.decode_attention(q, cache, **keywords(problem, device)))


def test_output_and_lse_have_the_promised_shape_and_dtype(device):
    for n in (1, 3):
        problem = make_problem(Case(num_q_tokens=n, q_dtype="bfloat16"))
        q, cache = query_tensor(problem, device), make_cache(problem, device)
        out, lse = pyquantattn.decode_attention(q, cache, return_lse=True, **keywords(problem, device))
        assert out.shape == q.shape and out.dtype == q.dtype
        assert lse.shape == q.shape[:-1] and lse.dtype == torch.float32


def test_a_single_token_axis_may_be_given(device):
    problem = make_problem(Case())
    q, cache = query_tensor(problem, device), make_cache(problem, device)
    flat = pyquantattn.decode_attention(q, cache, **keywords(problem, device))
    with_axis = pyquantattn.decode_attention(q[:, None], cache, **keywords(problem, device))
    assert with_axis.shape == (4, 1, 4, 64) and torch.equal(with_axis[:, 0], flat)
