"""Wrong edits of what stands round the kernels: appending, merging, checking arguments, reading tensors."""

from __future__ import annotations

from mutation.mutation import BAD_INPUT_TESTS, CODEC_TESTS, Mutation

ITEM = "cpp/cpu/item_runner.cc"
CODEC = "cpp/cpu/codec.cc"
MERGE = "cpp/cpu/merge.cc"
VALIDATE = "cpp/core/validate.cc"
VALIDATE_ATTENTION = "cpp/core/validate_attention.cc"
ARGUMENTS = "cpp/binding/arguments.cc"
ATTENTION_ARGUMENTS = "cpp/binding/attention_arguments.cc"

INTERFACE_MUTATIONS = (
    Mutation(
        "a slot of -1 writes slot 0",
        CODEC,
        "const int64_t slot = p.slot_mapping[t];",
        "const int64_t slot = std::max<int64_t>(p.slot_mapping[t], 0);",
        CODEC_TESTS,
    ),
    Mutation(
        "append mixes up K and V",
        CODEC,
        "p.v.offset(0, t, head) * bytes,",
        "p.v.offset(0, 0, head) * bytes,",
        CODEC_TESTS,
    ),
    Mutation(
        "merged LSE loses its maximum", MERGE, "max + std::log(a + b)}", "std::log(a + b)}", ("tests/test_merge.py",)
    ),
    Mutation(
        "merge averages", MERGE, "return {a / (a + b), b / (a + b),", "return {0.5f, 0.5f,", ("tests/test_merge.py",)
    ),
    Mutation(
        "lengths are not checked",
        VALIDATE_ATTENTION,
        "length >= 0 && length <= capacity",
        "length >= 0",
        BAD_INPUT_TESTS,
    ),
    Mutation(
        "16 query tokens are one too many",
        VALIDATE_ATTENTION,
        "p.num_q_tokens <= kMaxDecodeTokens",
        "p.num_q_tokens < kMaxDecodeTokens",
        ("tests/test_decode.py", "tests/test_supports.py"),
    ),
    Mutation(
        "num_splits ignored by the binding",
        "cpp/binding/attention_arguments.h",
        'read_optional_count(keywords.num_splits, who_, "num_splits").value_or(0);',
        "0;",
        BAD_INPUT_TESTS,
    ),
    Mutation("a NaN score passes for no key", ITEM, " || std::isnan(result.sum[row])", "", ("tests/test_masks.py",)),
    Mutation(
        "an empty side hides the other's NaN",
        MERGE,
        "lse_a == kEmpty && lse_b == kEmpty",
        "lse_a == kEmpty || lse_b == kEmpty",
        ("tests/test_merge.py",),
    ),
    Mutation(
        "live page ids are checked from below only",
        VALIDATE_ATTENTION,
        "page >= 0 && page < p.cache.num_pages",
        "page >= 0",
        BAD_INPUT_TESTS,
    ),
    Mutation(
        "slots are checked from above only",
        VALIDATE,
        "p.slot_mapping[t] >= -1 && p.slot_mapping[t] < num_slots",
        "p.slot_mapping[t] < num_slots",
        BAD_INPUT_TESTS,
    ),
    Mutation(
        "a page for each sequence is not demanded",
        VALIDATE_ATTENTION,
        "p.page_table || p.batch_size <= p.cache.num_pages",
        "true",
        BAD_INPUT_TESTS,
    ),
    Mutation(
        "forced splits in batch-invariant mode",
        VALIDATE_ATTENTION,
        "!(p.num_splits > 0 && p.batch_invariant)",
        "true",
        BAD_INPUT_TESTS,
    ),
    Mutation(
        "a scale of zero is a scale",
        ARGUMENTS,
        "value > 0.f && std::isfinite(value)",
        "std::isfinite(value)",
        BAD_INPUT_TESTS,
    ),
    Mutation(
        "True is a number of splits",
        ARGUMENTS,
        "!PyLong_Check(object.ptr()) || PyBool_Check(object.ptr())",
        "!PyLong_Check(object.ptr())",
        BAD_INPUT_TESTS,
    ),
    Mutation(
        "a negative view is read as it lies",
        "cpp/binding/tensor.cc",
        "return answer.ptr() == Py_True;",
        "return false;",
        BAD_INPUT_TESTS,
    ),
    Mutation(
        "an output may lie in the cache",
        ATTENTION_ARGUMENTS,
        'require_no_overlap(outputs_[i], tensor, "the cache\'s ");',
        "(void)tensor;",
        BAD_INPUT_TESTS,
    ),
    Mutation(
        "two halves of one buffer overlap",
        "cpp/binding/memory_overlap.cc",
        "axes.items[axis].size &&",
        "axes.items[axis].size ||",
        ("tests/test_layout.py",),
    ),
    Mutation(
        "slopes of the first sequence for all",
        ATTENTION_ARGUMENTS,
        "is_per_sequence ? slopes.strides[0] : 0",
        "0",
        ("tests/test_masks.py",),
    ),
    Mutation(
        "strides of first keys ignored",
        ATTENTION_ARGUMENTS,
        "(ints.data), ints.strides[0]}",
        "(ints.data), 1}",
        ("tests/test_layout.py",),
    ),
    Mutation(
        "columns of a page table are contiguous",
        ATTENTION_ARGUMENTS,
        "table.strides[0], table.strides[1]}",
        "table.strides[0], 1}",
        ("tests/test_layout.py",),
    ),
    Mutation(
        "a resized cache is used as it was",
        ATTENTION_ARGUMENTS,
        "if (cache != nullptr) cache->require_unmoved(who);",
        "",
        ("tests/test_cache.py", "tests/test_memory.py"),
    ),
    Mutation(
        "head_dims between the kernels' are served",
        "cpp/core/backend.h",
        "format == pair && head_dim >= min_head_dim && head_dim <= max_head_dim && head_dim % head_dim_multiple == 0",
        "format == pair && head_dim >= min_head_dim && head_dim <= max_head_dim",
        ("tests/test_supports.py", "tests/test_bad_input.py"),
    ),
    Mutation(
        "slopes of the paper for powers of two only",
        "cpp/core/alibi.cc",
        "i += 2)",
        "i += 1)",
        ("tests/test_masks.py",),
    ),
)
