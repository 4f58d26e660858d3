"""hybrid_attention equals the float64 reference over the dequantised cache, and the separate calls that it replaces."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bridge import OUTPUT_ROUNDING, keywords, make_cache, query_tensor, values_of_tensor
from cases import Case, make_problem
from comparison import assert_close
from ragged import (
    RaggedCase,
    arrays,
    assert_agree,
    check_hybrid,
    cumulative,
    hybrid_tensors,
    make_hybrid_problem,
    make_prefill_problem,
    prefill_arguments,
    prefill_tensors,
    rows_of,
)

import pyquantattn
from pyquantattn import KVCache, decode_attention, hybrid_attention

PAIRS = ["fp16", "bf16", "int8", "fp8_e4m3", "fp8_e5m2", "fp16/int8", "bf16/int8", "fp16/fp8_e4m3", "bf16/fp8_e4m3"]
PAIRS.append("int8/fp8_e4m3")
FORMATS = ["fp16", "int8", "fp8_e4m3"]
# Decoding, nothing, a whole prompt, a speculative step, a chunk after a prefix, more queries than keys, a short prompt.
MIXED = RaggedCase(seq_lens=(37, 12, 130, 70, 200, 3, 17, 0), q_lens=(1, 0, 130, 4, 65, 9, 17, 2))
EVERYTHING = replace(
    MIXED, alibi="rows", sliding_window=21, logits_soft_cap=6.0, has_sinks=True, has_starts=True, sm_scale=0.2
)
both_ways = pytest.mark.parametrize("causal", [True, False])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("q_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kv_format", PAIRS)
def test_hybrid_matches_float64_reference(kv_format, q_dtype, head_dim, hybrid_device):
    case = replace(MIXED, kv_format=kv_format, q_dtype=q_dtype, head_dim=head_dim)
    check_hybrid(make_hybrid_problem(case), hybrid_device)


@pytest.mark.parametrize("kv_format", PAIRS)
def test_without_causal_order(kv_format, hybrid_device):
    check_hybrid(make_hybrid_problem(replace(MIXED, kv_format=kv_format, causal=False)), hybrid_device)


@pytest.mark.parametrize("scales", ["head", "tensor"])
@pytest.mark.parametrize("kv_format", [pair for pair in PAIRS if pair not in ("fp16", "bf16")])
def test_static_scales(kv_format, scales, hybrid_device):
    check_hybrid(make_hybrid_problem(replace(MIXED, kv_format=kv_format, scales=scales, seed=1)), hybrid_device)


@pytest.mark.parametrize("octaves", [-12, 12])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kv_format", ["int8", "fp8_e4m3", "fp8_e5m2"])
def test_value_scales_of_all_magnitudes(kv_format, head_dim, octaves, hybrid_device):
    """Scales of single tokens that grow or shrink by 2^12 over the keys, a zero and a negative one among them."""
    case = RaggedCase(kv_format=kv_format, head_dim=head_dim, seq_lens=(400, 150), q_lens=(400, 40), page_size=None)
    problem = make_hybrid_problem(case)
    growth = np.exp2(np.linspace(0, octaves, problem.v_scale.shape[1]))[:, None]
    growth[37], growth[211] = 0, -growth[211]
    with np.errstate(invalid="ignore"):  # poison where no row looks
        scale = np.float16(problem.v_scale * growth).astype(np.float64)
    check_hybrid(replace(problem, v_scale=scale), hybrid_device)


@both_ways
@pytest.mark.parametrize("page_size", [16, None])
@pytest.mark.parametrize("kv_format", PAIRS)
def test_all_features_together(kv_format, page_size, causal, hybrid_device):
    case = replace(EVERYTHING, kv_format=kv_format, page_size=page_size, causal=causal)
    check_hybrid(make_hybrid_problem(case), hybrid_device)


@pytest.mark.parametrize("head_dim", range(32, 257, 8))
@pytest.mark.parametrize("kv_format", FORMATS)
def test_c4_every_head_dim_that_is_supported(kv_format, head_dim, hybrid_device):
    """C4: no head_dim is padded wrongly; one without a kernel is a clean error."""
    case = RaggedCase(kv_format=kv_format, head_dim=head_dim, seq_lens=(70, 33, 5), q_lens=(70, 20, 1), seed=head_dim)
    if not pyquantattn.supports(kv_format, head_dim, operation="hybrid_attention", device=hybrid_device):
        with pytest.raises(pyquantattn.UnsupportedError, match=f"head_dim {head_dim}"):
            hybrid_tensors(make_hybrid_problem(case), hybrid_device)
        return
    check_hybrid(make_hybrid_problem(case), hybrid_device)


@pytest.mark.parametrize("group", [1, 2, 4, 5, 8, 12, 71])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_c5_f8_every_group_size(kv_format, group, hybrid_device):
    """C5, F8: MHA, GQA and, with one KV head, MQA; groups that are no power of two."""
    for num_kv_heads in (1, 3):
        case = RaggedCase(
            kv_format=kv_format, group=group, num_kv_heads=num_kv_heads, seq_lens=(19, 0, 45, 8), q_lens=(19, 0, 1, 3)
        )
        check_hybrid(make_hybrid_problem(case), hybrid_device)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64, None])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_layouts_and_page_sizes(kv_format, page_size, layout, hybrid_device):
    case = replace(MIXED, kv_format=kv_format, page_size=page_size, layout=layout)
    check_hybrid(make_hybrid_problem(case), hybrid_device)


@pytest.mark.parametrize("num_queries", [1, 2, 7, 15, 16, 17, 18, 31, 32, 33, 64, 65])
@pytest.mark.parametrize("kv_format", ["bf16", "int8", "fp8_e5m2"])
def test_e1_every_number_of_query_tokens(kv_format, num_queries, hybrid_device):
    """E1: on both sides of the border between decoding and prefill, with more keys and with fewer."""
    lens = (0, 1, num_queries - 1, num_queries, num_queries + 1, 130)
    case = RaggedCase(kv_format=kv_format, seq_lens=lens, q_lens=(num_queries,) * len(lens))
    check_hybrid(make_hybrid_problem(case), hybrid_device)


@both_ways
@pytest.mark.parametrize("window", [1, 2, 16, 33, 129, 130, 131, 10**6])
@pytest.mark.parametrize("group", [1, 2])
def test_e2_sliding_window(group, window, causal, hybrid_device):
    case = RaggedCase(seq_lens=(130, 3, 0, 65), q_lens=(130, 1, 0, 40), sliding_window=window, causal=causal)
    check_hybrid(make_hybrid_problem(replace(case, group=group)), hybrid_device)


@pytest.mark.parametrize("length", [1, 17, 64, 65, 127])
def test_b4_every_chunk_of_a_sequence(length, hybrid_device):
    """B4: the last n tokens of a sequence, for every n: the border of tiles of queries moves over that of keys."""
    q_lens = tuple(range(length + 2))
    case = RaggedCase(seq_lens=(length,) * len(q_lens), q_lens=q_lens, num_kv_heads=1, group=1, head_dim=32)
    check_hybrid(make_hybrid_problem(case), hybrid_device)


@pytest.mark.parametrize("options", [{"num_splits": n} for n in (1, 2, 7, 64)] + [{"batch_invariant": True}], ids=str)
@pytest.mark.parametrize("kv_format", FORMATS)
def test_c7_splits_return_to_their_own_rows(kv_format, options, hybrid_device):
    """C7: partial results of long sequences, with many query tokens and with one."""
    case = RaggedCase(kv_format=kv_format, seq_lens=(700, 1300, 5, 0, 513), q_lens=(1, 40, 5, 0, 3), has_sinks=True)
    check_hybrid(make_hybrid_problem(case), hybrid_device, **options)


@pytest.mark.parametrize("options", [{}, {"num_splits": 3}, {"batch_invariant": True}], ids=str)
@pytest.mark.parametrize("lens", [(37, 0, 600, 1), (600, 600, 600, 600)], ids=["ragged", "equal"])
@pytest.mark.parametrize("num_q_tokens", [1, 4, 16])
@pytest.mark.parametrize("kv_format", PAIRS)
def test_decoding_alone_equals_decode_attention_bit_by_bit(kv_format, num_q_tokens, lens, options, hybrid_device):
    """The same kernel computes the same rows in the same order. Batch-invariant calls on a GPU are an exception: they
    must not look at the number of query tokens, by which decode_attention chooses how many rows a tile has."""
    case = Case(kv_format=kv_format, seq_lens=lens, num_q_tokens=num_q_tokens, alibi="rows", has_sinks=True)
    problem = make_problem(case)
    q, cache, given = (make(problem, hybrid_device) for make in (query_tensor, make_cache, keywords))
    out, lse = decode_attention(q, cache, return_lse=True, **given, **options)
    rows = q.reshape(-1, *q.shape[-2:])
    ends = num_q_tokens * torch.arange(5, dtype=torch.int32, device=hybrid_device)
    result = hybrid_attention(rows, cache, cu_seqlens_q=ends, return_lse=True, **given, **options)
    expected = out.reshape(rows.shape), lse.reshape(rows.shape[:2])
    if hybrid_device == "cuda" and options.get("batch_invariant") and num_q_tokens == 16:
        assert_agree(result, expected, kv_format, hybrid_device)
    else:
        assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


@pytest.mark.parametrize("num_queries", [1, 2])
@pytest.mark.parametrize(("kv_format", "group"), [("fp16", 1), ("int8", 4), ("fp8_e4m3", 16)])
@pytest.mark.parametrize(("batch_size", "length"), [(1, 900), (16, 700), (16, 1100), (33, 130), (130, 17)])
def test_equal_lengths(batch_size, length, kv_format, group, num_queries, hybrid_device):
    """Batches whose work may be cut at the ends of items, and neighbours of the same number of query tokens, which may
    not: one length that differs, a sequence with the tokens of another, one with the tokens of all."""
    lens, counts = [length] * batch_size, [num_queries] * batch_size
    middle, last = batch_size // 2, batch_size - 1
    longer = [length + 16 * (b == middle) for b in range(batch_size)]
    moved = [num_queries + (b == middle) - (b == last) for b in range(batch_size)]
    alone = [sum(counts) * (b == middle) for b in range(batch_size)]
    for seq_lens, q_lens in ((lens, counts), (longer, counts), (lens, moved), (lens, alone)):
        case = RaggedCase(
            kv_format=kv_format,
            seq_lens=tuple(seq_lens),
            q_lens=tuple(q_lens),
            group=group,
            num_kv_heads=2,
            head_dim=32,
        )
        check_hybrid(make_hybrid_problem(case), hybrid_device)


@pytest.mark.parametrize("kv_format", PAIRS)
def test_a_mixed_batch_equals_separate_calls(kv_format, hybrid_device):
    """Each sequence alone, a decoding one by decode_attention, too: the same bits where nothing depends on the batch.
    decode_attention may choose tiles of other heights on a GPU."""
    problem = make_hybrid_problem(replace(EVERYTHING, kv_format=kv_format))
    q, cache, given = (make(problem, hybrid_device) for make in (query_tensor, make_cache, keywords))
    whole = hybrid_attention(q, cache, return_lse=True, batch_invariant=True, **given)
    causal, per_sequence = given.pop("causal"), ("seq_lens", "page_table", "seq_starts", "alibi_slopes")
    given.pop("cu_seqlens_q")
    for b, rows in enumerate(rows_of(problem.case)):
        one = given | {name: given[name][b : b + 1] for name in per_sequence}
        one |= {"return_lse": True, "batch_invariant": True}
        part, num_queries = (whole[0][rows], whole[1][rows]), rows.stop - rows.start
        ends = torch.tensor([0, num_queries], dtype=torch.int32, device=hybrid_device)
        out, lse = hybrid_attention(q[rows], cache, cu_seqlens_q=ends, causal=causal, **one)
        assert torch.equal(part[0], out) and torch.equal(part[1], lse), b
        if 1 <= num_queries <= 16:
            out, lse = (x[0] for x in decode_attention(q[None, rows], cache, **one))
            if hybrid_device == "cpu":
                assert torch.equal(part[0], out) and torch.equal(part[1], lse), b
            assert_agree(part, (out, lse), kv_format, hybrid_device)


@both_ways
@pytest.mark.parametrize("dtype,kv_format", [("float16", "fp16"), ("bfloat16", "bf16")])
@pytest.mark.parametrize("page_size", [16, 200])
def test_prefill_over_fresh_keys_equals_the_same_keys_in_a_cache(page_size, dtype, kv_format, causal, hybrid_device):
    """A 16-bit cache holds K and V of its dtype bit by bit."""
    problem = make_prefill_problem(RaggedCase(q_dtype=dtype, causal=causal, q_lens=(37, 0, 65, 1, 20)))
    problem.k, problem.v = np.nan_to_num(problem.k), np.nan_to_num(problem.v)
    fresh = prefill_tensors(problem, hybrid_device)
    q, k, v = prefill_arguments(problem, hybrid_device)
    cache, table = filled_cache(k, v, problem.case.seq_lens, page_size, kv_format, hybrid_device)
    ends = torch.from_numpy(cumulative(problem.case.query_lengths)).to(hybrid_device)
    lens = torch.tensor(problem.case.seq_lens, dtype=torch.int32, device=hybrid_device)
    cached = hybrid_attention(
        q, cache, cu_seqlens_q=ends, seq_lens=lens, page_table=table, causal=causal, return_lse=True
    )
    assert_agree(fresh, cached, kv_format, hybrid_device, dtype)


def filled_cache(k, v, lens, page_size, kv_format, device):
    """The sequences of k and v [S, H, D] appended to pages in reverse order. Returns the cache and its page table."""
    pages_per_sequence = -(-max(lens) // page_size)
    num_pages = len(lens) * pages_per_sequence
    table = torch.arange(num_pages - 1, -1, -1, dtype=torch.int32, device=device).view(len(lens), pages_per_sequence)
    cache = KVCache.allocate(num_pages, page_size, k.shape[1], k.shape[2], kv_format, device)
    tokens = [torch.arange(length, device=device) for length in lens]
    slots = [table[b, t // page_size] * page_size + t % page_size for b, t in enumerate(tokens)]
    cache.append(k, v, torch.cat(slots).long())
    return cache, table


def test_the_order_of_sequences_does_not_matter(hybrid_device):
    """Decoding sequences first, last or between prompts: each row keeps its result."""
    problem = make_hybrid_problem(MIXED)
    out, _ = arrays(hybrid_tensors(problem, hybrid_device))
    rows = rows_of(MIXED)
    order = [4, 0, 7, 2, 6, 1, 3, 5]
    case = replace(
        MIXED, seq_lens=tuple(MIXED.seq_lens[b] for b in order), q_lens=tuple(MIXED.q_lens[b] for b in order)
    )
    moved = replace(
        problem,
        case=case,
        q=np.concatenate([problem.q[rows[b]] for b in order]),
        seq_lens=problem.seq_lens[order],
        page_table=problem.page_table[order],
    )
    moved_out, _ = arrays(hybrid_tensors(moved, hybrid_device))
    expected = np.concatenate([out[rows[b]] for b in order])
    assert_close(moved_out, expected, relative=2e-3, rounding=2 * OUTPUT_ROUNDING["float16"])


def test_output_is_written_in_place_and_returned(hybrid_device):
    problem = make_hybrid_problem(MIXED)
    q, cache, given = (make(problem, hybrid_device) for make in (query_tensor, make_cache, keywords))
    out = torch.full_like(q, float("nan"))
    returned, lse = hybrid_attention(q, cache, out=out, return_lse=True, **given)
    assert returned is out and torch.equal(out, hybrid_attention(q, cache, **given))
    assert lse.shape == q.shape[:2] and lse.dtype == torch.float32
    assert np.isfinite(values_of_tensor(out)).all()
