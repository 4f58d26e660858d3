"""Wrong edits of the CUDA kernels that decode, append and merge."""

from __future__ import annotations

from mutation.mutation import CODEC_TESTS, CudaMutation

APPEND = "cuda/append/kernel.cuh"
CODEC = "cuda/codec/vector_codec.cuh"
CUDA_CORES = "cuda/decode/cuda_core_engine.cuh"
JOIN = "cuda/decode/merge_pieces.cuh"
MERGE = "cuda/merge/merge.cu"
OFFSET = "cuda/decode/score_offset.cuh"
PIPELINE = "cuda/decode/tile_pipeline.cuh"
ROWS = "cuda/decode/rows.cuh"
SCHEDULE = "cuda/decode/schedule.cuh"
SEQUENCES = "cuda/decode/sequences.cuh"
TENSOR_CORES = "cuda/decode/tensor_core_engine.cuh"
SOFT_CAP = (
    "  if (p.logits_soft_cap > 0.f) score = p.logits_soft_cap "
    "* tanhf((score + row.offset) / p.logits_soft_cap) * kLog2e;\n"
)
ALIBI = "  if (p.alibi_slopes) score += row.slope * static_cast<float>(key - row.position);\n"
BORDER_TESTS = ("tests/test_hybrid.py::test_e1_every_number_of_query_tokens",)
VISIBLE_NAN_TESTS = ("tests/test_visible_nan.py",)
MERGE_TESTS = ("tests/test_merge.py",)
OFFSET_TESTS = ("tests/test_key_offset.py",)
EQUAL_LENGTHS_TESTS = ("tests/test_hybrid.py::test_equal_lengths",)
SPLIT_TESTS = ("tests/test_decode.py::test_c7_splits_with_several_tokens_and_sequences", "tests/test_lengths.py")

CUDA_DECODE_MUTATIONS = (
    # Scales.
    CudaMutation("K scales dropped", TENSOR_CORES, "scores[n][i] *= k_scale[i / 2];", "{}"),
    CudaMutation("V scales dropped", TENSOR_CORES, "w[i] *= v_scale[i / 2];", "{}"),
    CudaMutation("K scales dropped on CUDA cores", CUDA_CORES, "scores[r] *= stage.k_scale[lane_ % 16];", "{}"),
    CudaMutation("V scales dropped on CUDA cores", CUDA_CORES, "weights[r] *= stage.v_scale[lane_ % 16];", "{}"),
    CudaMutation("static scale of head 0", ROWS, "scale.offset(0, 0, head)", "scale.offset(0, 0, 0)"),
    CudaMutation("static V scale dropped", TENSOR_CORES, "common_unit * rows_[row].v_scale", "common_unit"),
    CudaMutation(
        "token scale of head 0",
        PIPELINE,
        "scale.offset(source.page, source.own_in_page, source.kv_head)",
        "scale.offset(source.page, source.own_in_page, 0)",
    ),
    CudaMutation(
        "output not rescaled to a larger V scale",
        TENSOR_CORES,
        "= __uint_as_float(v_unit_bits_) * __uint_as_float(0x7F000000u - unit_bits);",
        "= 1.f;",
    ),
    # Which keys are seen.
    CudaMutation(
        "causal mask shows the next key",
        ROWS,
        "task.is_causal() ? constants.position :",
        "task.is_causal() ? constants.position + 1 :",
    ),
    CudaMutation(
        "window one key too wide",
        ROWS,
        "constants.position + 1 - p.sliding_window",
        "constants.position - p.sliding_window",
    ),
    CudaMutation(
        "first visible key ignored",
        ROWS,
        "copy_or_store(first_key, p.seq_starts ? &p.seq_starts[item.sequence] : nullptr, 0);",
        "first_key = 0;",
    ),
    CudaMutation("keys past the length are read", PIPELINE, "token < span.end_key;", "token <= span.end_key;"),
    CudaMutation(
        "causal order from the top left",
        SEQUENCES,
        "const int first_position = length - all_tokens + first_index;",
        "const int first_position = first_index;",
    ),
    CudaMutation(
        "page table of sequence 0",
        PIPELINE,
        "&table.at(cursor_.item.sequence, page_index)",
        "&table.at(0, page_index)",
    ),
    CudaMutation(
        "sequences of the most query tokens left out",
        SEQUENCES,
        "count <= task.most_tokens",
        "count < task.most_tokens",
        BORDER_TESTS,
    ),
    # Scores.
    CudaMutation("soft cap after ALiBi", ROWS, SOFT_CAP + ALIBI, ALIBI + SOFT_CAP),
    CudaMutation("ALiBi off by one", ROWS, "(key - row.position)", "(key - row.position + 1)"),
    CudaMutation(
        "key offset dropped from the log-sum-exp",
        OFFSET,
        "? maximum : maximum + row.offset;",
        "? maximum : maximum;",
        OFFSET_TESTS,
    ),
    # Softmax, sinks, splits.
    CudaMutation("sum not rescaled to a new maximum", TENSOR_CORES, "sum_[n][i] *= rescale;", "{}"),
    CudaMutation("sink dropped", ROWS, "if (!p.sinks) return", "if (!p.sinks || p.sinks) return"),
    CudaMutation("LSE in base 2", ROWS, "maximum * kLn2 + logf(sum)", "maximum + logf(sum)"),
    CudaMutation(
        "a split skipped",
        JOIN,
        "first + k * num_groups < pieces.count ? exp2_approx",
        "(first + k * num_groups + 1 < pieces.count || first + k * num_groups == 0) ? exp2_approx",
        SPLIT_TESTS,
    ),
    CudaMutation(
        "the first of many splits keep their weights", JOIN, "    scale_quad(values, rescale);\n", "", SPLIT_TESTS
    ),
    # The cut of equal lengths.
    CudaMutation(
        "rows that differ are cut like equal ones",
        SCHEDULE,
        "queries_of(task, b).num_rows == task.num_rows",
        "true",
        EQUAL_LENGTHS_TESTS,
    ),
    # Values that are not finite.
    CudaMutation(
        "hidden values multiplied by zero",
        TENSOR_CORES,
        "if (masked && may_rows_differ(task_)) remove_non_finite_values(stage, first_token);",
        "",
    ),
    CudaMutation(
        "rows that see a bad value are not told", TENSOR_CORES, "? 1u << r : 0u;", "? 0u : 0u;", VISIBLE_NAN_TESTS
    ),
    CudaMutation(
        "rows that see a bad value are not told on CUDA cores",
        CUDA_CORES,
        "? 1u << r : 0u;",
        "? 0u : 0u;",
        VISIBLE_NAN_TESTS,
    ),
    CudaMutation(
        "hidden values multiplied by zero on CUDA cores",
        CUDA_CORES,
        "if (masked && may_rows_differ(task_)) remove_non_finite_values(stage, first_token);",
        "",
    ),
    # Append, merge.
    CudaMutation(
        "V's scales written over K's",
        APPEND,
        "cache.v_codes, cache.v_scale,",
        "cache.v_codes, cache.k_scale,",
        CODEC_TESTS,
    ),
    CudaMutation("dynamic scale of the first 128 channels", CODEC, "amax = octet_amax(x, amax);", "{}", CODEC_TESTS),
    CudaMutation(
        "dynamic scale of a lane's own channels",
        CODEC,
        "__reduce_max_sync(team_mask(), formats::bits_of(amax))",
        "formats::bits_of(amax)",
        CODEC_TESTS,
    ),
    CudaMutation(
        "second side weighed like the first", MERGE, "sum != 0.f ? b / sum", "sum != 0.f ? a / sum", MERGE_TESTS
    ),
    CudaMutation(
        "a NaN of one side is lost",
        MERGE,
        "weight_a = sum != 0.f ? a / sum : 0.f, weight_b = sum != 0.f ?",
        "weight_a = sum > 0.f ? a / sum : 0.f, weight_b = sum > 0.f ?",
        MERGE_TESTS,
    ),
    CudaMutation("LSE of merged states in base 2", MERGE, "base + logf(sum)", "base + log2f(sum)", MERGE_TESTS),
)
