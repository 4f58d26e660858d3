"""Wrong edits of what only ragged batches have: prefill over fresh K and V, hybrid batches over a cache."""

from __future__ import annotations

from mutation.mutation import BAD_BATCH_TESTS, HYBRID_TESTS, PREFILL_TESTS, Mutation

ATTENTION = "cpp/cpu/attention.cc"
BATCH = "cpp/cpu/attention_batch.cc"
ITEM = "cpp/cpu/item_runner.cc"
SCHEDULE = "cpp/cpu/schedule.cc"
SOFTMAX = "cpp/cpu/softmax.h"
VALIDATE = "cpp/core/validate_attention.cc"
BINDING = "cpp/binding/prefill.cc"
LONG_TESTS = ("tests/test_prefill.py::test_d6_the_error_does_not_grow_with_the_length",)
MEMORY_TESTS = (
    "tests/test_ragged_memory.py::test_a1_a_fresh_key_spoils_no_row_that_stands_before_it",
    "tests/test_ragged_memory.py::test_a1_a_cached_key_spoils_no_row_that_stands_before_it",
)
LAYOUT_TESTS = ("tests/test_ragged_layout.py::test_c2_prefill_takes_any_strides",)

BATCH_MUTATIONS = (
    # Where each sequence's tokens and keys are.
    Mutation("fresh keys of the first sequence", BATCH, "cu_seqlens_k ? cu_seqlens_k[b] : 0;", "0;", PREFILL_TESTS),
    Mutation(
        "fresh keys counted like queries",
        BATCH,
        "cu_seqlens_k[b + 1] - cu_seqlens_k[b] :",
        "found.num_q_tokens :",
        PREFILL_TESTS,
    ),
    Mutation(
        "fresh values with the strides of keys",
        BATCH,
        "p.v.token_stride, p.v.head_stride};",
        "p.k.token_stride, p.k.head_stride};",
        LAYOUT_TESTS,
    ),
    Mutation(
        "LSE of a ragged batch at the first sequence",
        BATCH,
        "found.q_token = found.lse_token = cu_seqlens_q[b];",
        "found.q_token = cu_seqlens_q[b];",
        HYBRID_TESTS,
    ),
    Mutation("cu_seqlens_k ignored", BINDING, "cu_seqlens_k.is_none()\n", "true\n", PREFILL_TESTS),
    # Which keys are seen.
    Mutation(
        "prefill always causal",
        BATCH,
        "batch.cu_seqlens_k = p.cu_seqlens_k;\n  batch.causal = p.causal;",
        "batch.cu_seqlens_k = p.cu_seqlens_k;",
        PREFILL_TESTS,
    ),
    Mutation(
        "hybrid batches always causal",
        BATCH,
        "batch.cu_seqlens_q = p.cu_seqlens_q;\n  batch.causal = p.causal;",
        "batch.cu_seqlens_q = p.cu_seqlens_q;",
        HYBRID_TESTS,
    ),
    Mutation(
        "causal order from the top left",
        BATCH,
        "const int64_t position = sequence.length - sequence.num_q_tokens + i;",
        "const int64_t position = i;",
        PREFILL_TESTS,
    ),
    Mutation(
        "the last key hidden without causal order",
        BATCH,
        "position + 1 : sequence.length}",
        "position + 1 : sequence.length - 1}",
        PREFILL_TESTS,
    ),
    Mutation(
        "a tile that ends behind some rows counts as seen whole",
        ITEM,
        "seen.end >= end_key; });",
        "seen.end > first_key; });",
        PREFILL_TESTS,
    ),
    Mutation(
        "a tile that starts before some rows' window counts as seen whole",
        ITEM,
        "seen.first > first_key; });",
        "seen.first >= end_key; });",
        PREFILL_TESTS,
    ),
    Mutation(
        "rows that see one key of a tile pass it by",
        ITEM,
        "seen.end > first_key; })",
        "seen.end > first_key + 1; })",
        PREFILL_TESTS,
    ),
    Mutation(
        "rows whose window reaches the last key of a tile pass it by",
        ITEM,
        "seen.first >= end_key; })",
        "seen.first >= end_key - 1; })",
        PREFILL_TESTS,
    ),
    Mutation(
        "window ignored inside a tile",
        ITEM,
        "visible[r] = {token_of(seen.first),",
        "visible[r] = {0,",
        PREFILL_TESTS,
    ),
    Mutation(
        "rows of a band see no more than the first of them",
        ITEM,
        "visible[count - 1].end, visible);",
        "visible[0].end, visible);",
        PREFILL_TESTS,
    ),
    Mutation(
        "one key too many at a lane's mask",
        SOFTMAX,
        "static_cast<float>(visible.end - token)",
        "static_cast<float>(visible.end + 1 - token)",
        PREFILL_TESTS,
    ),
    Mutation(
        "one key too few at a lane's window",
        SOFTMAX,
        "static_cast<float>(visible.first - token)",
        "static_cast<float>(visible.first + 1 - token)",
        PREFILL_TESTS,
    ),
    Mutation(
        "hidden values multiplied by zero",
        ITEM,
        "if (!visible || tile.values.is_finite)",
        "if (!visible || visible)",
        MEMORY_TESTS,
    ),
    Mutation("hidden keys set the rounding", ITEM, "unpack(true, &tile);", "unpack(false, &tile);", MEMORY_TESTS),
    # Blocks of query tokens, tiles and parts of keys.
    Mutation(
        "the last block of query tokens skipped",
        SCHEDULE,
        "work.num_token_blocks = divide_up(sequence.num_q_tokens, work.tokens_per_block);",
        "work.num_token_blocks = sequence.num_q_tokens / work.tokens_per_block;",
        PREFILL_TESTS,
    ),
    Mutation(
        "the last rows of a block skipped",
        ITEM,
        "for (int row = rows.first; row < rows.end; row += kRowBlock)\n    attend_rows(",
        "for (int row = rows.first; row + kRowBlock <= rows.end; row += kRowBlock)\n    attend_rows(",
        PREFILL_TESTS,
    ),
    Mutation(
        "the last rows that see part of a tile skipped",
        ITEM,
        "for (int row = rows.first; row < rows.end; row += kBandRows) {",
        "for (int row = rows.first; row + kBandRows <= rows.end; row += kBandRows) {",
        PREFILL_TESTS,
    ),
    Mutation(
        "the last tile of many skipped",
        ITEM,
        "for (int64_t key = keys.first; key < keys.end; key += kTileTokens,",
        "for (int64_t key = keys.first; key == keys.first || key + kTileTokens < keys.end; key += kTileTokens,",
        PREFILL_TESTS,
    ),
    Mutation(
        "keys past the first part of a long prompt skipped",
        ITEM,
        "first < item_.keys.end; first += kMaxSplit) {",
        "first + item_.keys.end < 0; first += kMaxSplit) {",
        LONG_TESTS,
    ),
    Mutation(
        "results of a block return to the first one",
        ITEM,
        "const int64_t token = item_.first_token + row %",
        "const int64_t token = row %",
        PREFILL_TESTS,
    ),
    Mutation(
        "queries of the block before",
        ITEM,
        "loaded().first_token == item_.first_token && ",
        "",
        PREFILL_TESTS,
    ),
    Mutation(
        "ALiBi counted from the block's first token",
        ITEM,
        "const int64_t token = item_.first_token + (row + r) / group_;",
        "const int64_t token = (row + r) / group_;",
        PREFILL_TESTS,
    ),
    Mutation(
        "sequences that decode left out of a batch that prefills",
        ATTENTION,
        "if (work.num_items() > 0) *(",
        "if (work.has_many_tokens()) *(",
        HYBRID_TESTS,
    ),
    # Arguments.
    Mutation(
        "cumulative lengths may decrease",
        VALIDATE,
        "require(cu_seqlens[b] <= cu_seqlens[b + 1],",
        "require(true,",
        BAD_BATCH_TESTS,
    ),
    Mutation(
        "cumulative lengths may end before the tokens",
        VALIDATE,
        "cu_seqlens[batch_size] == num_tokens",
        "cu_seqlens[batch_size] <= num_tokens",
        BAD_BATCH_TESTS,
    ),
    Mutation(
        "fresh values of any shape",
        BINDING,
        'arguments.read_rows(v_object, "v", k.shape[0], k.shape[1]);',
        'arguments.read_rows(v_object, "v", kAnySize, kAnySize);',
        BAD_BATCH_TESTS,
    ),
)
