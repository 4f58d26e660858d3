"""The reference itself against closed forms and the published tables, so that it cannot share a kernel's mistake."""

import numpy as np
import oracle
import pytest
from cases import Case, make_problem
from comparison import assert_close, assert_same_bits
from oracle.codecs import decode, encode, round_up_to_float16

FP16, BF16, INT8, E4M3, E5M2 = (oracle.FORMATS[n] for n in ("fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2"))


def test_e4m3_table_of_the_paper():
    values = decode(np.array([0x00, 0x01, 0x07, 0x08, 0x38, 0x7E, 0x7F, 0x80, 0xFE]), E4M3)
    np.testing.assert_array_equal(values, [0, 2**-9, 7 * 2**-9, 2**-6, 1, 448, np.nan, -0.0, -448])


def test_e5m2_table_of_the_paper():
    values = decode(np.array([0x01, 0x03, 0x04, 0x3C, 0x7B, 0x7C, 0x7D, 0xFC]), E5M2)
    np.testing.assert_array_equal(values, [2**-16, 3 * 2**-16, 2**-14, 1, 57344, np.inf, np.nan, -np.inf])


def test_fp16_agrees_with_numpy_on_every_pattern():
    patterns = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(decode(patterns, FP16), patterns.view(np.float16).astype(np.float64))


def test_fp16_rounding_agrees_with_numpy():
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.normal(size=4000) * 10.0 ** rng.integers(-9, 6, 4000), [65519.999, 65520, 2.0**-25, -(2.0**-25)]]
    )
    with np.errstate(over="ignore"):
        assert_same_bits(encode(x, FP16), x.astype(np.float16).view(np.uint16), "fp16")


def test_bf16_is_the_upper_half_of_float32():
    x = np.array([1.0, -2.5, 3e38, 1e-40, 0.0], np.float32)
    upper = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    np.testing.assert_array_equal(decode(encode(upper.astype(np.float64), BF16), BF16), upper)
    assert encode(np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8]), BF16).tolist() == [0x3F80, 0x3F82]  # ties go to even


@pytest.mark.parametrize("fmt", [FP16, BF16, E4M3, E5M2], ids=lambda f: f.name)
def test_encoding_inverts_decoding(fmt):
    codes = np.arange(2 ** (8 * fmt.code_bytes)).astype(fmt.code_dtype)
    values = decode(codes, fmt)
    finite = np.isfinite(values)
    assert_same_bits(encode(values[finite], fmt), codes[finite], fmt.name)


def test_round_up_to_float16():
    x = np.array([0, 1, 1 + 2.0**-20, 1e-9, 65504, 65505, 1e9], np.float32)
    np.testing.assert_array_equal(round_up_to_float16(x), [0, 1, 1 + 2.0**-10, 2.0**-24, 65504, 65504, 65504])


def test_slopes_of_the_paper():
    np.testing.assert_allclose(oracle.get_alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(oracle.get_alibi_slopes(12)[8:], 2.0 ** -np.array([0.5, 1.5, 2.5, 3.5]))


def _decode(q, k, v, **options):
    return oracle.decode_attention(q, k, v, seq_lens=np.array([k.shape[1]]), **options)


def test_attention_of_a_zero_query_is_the_mean():
    rng = np.random.default_rng(1)
    k, v = rng.normal(size=(2, 1, 9, 2, 8))
    out, lse = _decode(np.zeros((1, 1, 4, 8)), k, v)
    assert_close(out[0, 0], v[0].mean(0).repeat(2, axis=0), relative=1e-12)
    np.testing.assert_allclose(lse, np.log(9))


def test_window_of_one_sees_only_itself_and_causality_is_bottom_right():
    rng = np.random.default_rng(2)
    q, k, v = rng.normal(size=(1, 3, 1, 8)), *rng.normal(size=(2, 1, 9, 1, 8))
    out, _ = _decode(q, k, v, sliding_window=1)
    assert_close(out[0, :, 0], v[0, 6:9, 0], relative=1e-12)


def test_nothing_visible_gives_zero_and_minus_infinity_or_the_sink():
    q, kv, empty = np.ones((1, 1, 1, 8)), np.ones((1, 4, 1, 8)), np.array([0])
    out, lse = oracle.decode_attention(q, kv, kv, seq_lens=empty)
    assert (out == 0).all() and (lse == -np.inf).all()
    out, lse = oracle.decode_attention(q, kv, kv, seq_lens=empty, sinks=np.array([2.5]))
    assert (out == 0).all() and (lse == 2.5).all()


def test_merging_halves_gives_the_whole():
    rng = np.random.default_rng(3)
    q, k, v = rng.normal(size=(1, 1, 2, 8)), *rng.normal(size=(2, 1, 10, 2, 8))
    whole = _decode(q, k, v)
    merged = oracle.merge_states(*_decode(q, k[:, :4], v[:, :4]), *_decode(q, k[:, 4:], v[:, 4:]))
    for part, full in zip(merged, whole, strict=True):
        assert_close(part, full, relative=1e-12)


def test_causal_order_is_bottom_right_aligned():
    """Zero queries: the mean of what each row sees. Two queries over four keys stand at positions 2 and 3."""
    rng = np.random.default_rng(4)
    k, v = rng.normal(size=(2, 4, 1, 8))
    ends = {"cu_seqlens_q": np.array([0, 2]), "cu_seqlens_k": np.array([0, 4])}
    out, lse = oracle.prefill_attention(np.zeros((2, 1, 8)), k, v, **ends)
    assert_close(out[:, 0], np.stack([v[:3, 0].mean(0), v[:, 0].mean(0)]), relative=1e-12)
    np.testing.assert_allclose(lse[:, 0], np.log([3, 4]))
    out, lse = oracle.prefill_attention(np.zeros((2, 1, 8)), k, v, causal=False, **ends)
    assert_close(out[:, 0], np.stack([v[:, 0].mean(0)] * 2), relative=1e-12)
    np.testing.assert_allclose(lse, np.log(4))


def test_more_queries_than_keys_leave_the_first_ones_blind():
    out, lse = oracle.prefill_attention(
        np.ones((3, 1, 8)), *np.ones((2, 1, 1, 8)), cu_seqlens_q=np.array([0, 3]), cu_seqlens_k=np.array([0, 1])
    )
    assert (out[:2] == 0).all() and (lse[:2] == -np.inf).all() and (out[2] == 1).all()


def test_a_window_without_causal_order_bounds_the_past_alone():
    """The row at position p sees keys p - 1 and p and all behind."""
    v = np.arange(5.0)[:, None, None] * np.ones(8)
    zeros = np.zeros((5, 1, 8))
    out, _ = oracle.prefill_attention(zeros, zeros, v, cu_seqlens_q=np.array([0, 5]), causal=False, sliding_window=2)
    np.testing.assert_allclose(out[:, 0, 0], [np.arange(max(0, p - 1), 5).mean() for p in range(5)])


def test_alibi_reaches_keys_behind_the_position():
    zeros = np.zeros((2, 1, 8))
    _, lse = oracle.prefill_attention(
        zeros, zeros, zeros, cu_seqlens_q=np.array([0, 2]), causal=False, alibi_slopes=np.array([0.5])
    )
    np.testing.assert_allclose(lse[:, 0], np.log([1 + np.exp(0.5), np.exp(-0.5) + 1]))


def test_sequences_of_a_ragged_batch_are_apart():
    """Three prompts at once equal each of them alone, over fresh K and V and over pages."""
    rng = np.random.default_rng(5)
    q, k, v = rng.normal(size=(9, 4, 8)), *rng.normal(size=(2, 9, 2, 8))
    ends = np.array([0, 4, 4, 9])
    out, lse = oracle.prefill_attention(q, k, v, cu_seqlens_q=ends)
    for rows in (slice(0, 4), slice(4, 9)):
        alone = oracle.prefill_attention(q[rows], k[rows], v[rows], cu_seqlens_q=np.array([0, rows.stop - rows.start]))
        np.testing.assert_array_equal(out[rows], alone[0])
        np.testing.assert_array_equal(lse[rows], alone[1])
    pages = np.full((2, 4, 3, 2, 8), np.nan)  # of K and V: four pages of three tokens
    table = np.array([[2, 0], [-1, -1], [1, 3]])
    for side, rows in zip(pages, (k, v), strict=True):
        side[2], side[0, :1], side[1], side[3, :2] = rows[:3], rows[3:4], rows[4:7], rows[7:]
    paged = oracle.hybrid_attention(q, *pages, cu_seqlens_q=ends, seq_lens=np.array([4, 0, 5]), page_table=table)
    np.testing.assert_array_equal(out, paged[0])
    np.testing.assert_array_equal(lse, paged[1])


def test_problems_are_poisoned_and_scales_are_distinct():
    """DESIGN rules 3 and 4: K and V scales differ from each other and from 1; unused bytes hold NaN."""
    for scales in ("token_head", "head"):
        problem = make_problem(Case(kv_format="fp8_e4m3", scales=scales))
        live_k, live_v = (s[np.isfinite(s)] for s in (problem.k_scale, problem.v_scale))
        assert len(np.unique(np.concatenate([live_k, live_v, [1.0]]))) > 4
        assert abs(np.median(live_k) / np.median(live_v) - 1) > 0.3
    problem = make_problem(Case(kv_format="fp8_e4m3"))
    assert np.isnan(problem.v_scale).any() and (problem.k_codes == 0x7F).any()
    assert (problem.page_table == -1).any() and (problem.k_codes[0] & 0x7F == 0x7F).all()
    assert INT8.max_code == 127
