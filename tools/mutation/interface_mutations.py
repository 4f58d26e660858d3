"""Wrong edits of what stands round the kernels: appending, merging, checking arguments, reading tensors."""

from __future__ import annotations

from mutation.mutation import BAD_INPUT_TESTS, CODEC_TESTS, Mutation

ITEM = "cpp/cpu/item_runner.cc"
CODEC = "cpp/cpu/codec.cc"
MERGE = "cpp/cpu/merge.cc"
VALIDATE = "cpp/core/validate.cc"
ARGUMENTS = "cpp/binding/arguments.cc"
BINDING = "cpp/binding/decode.cc"

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
        VALIDATE,
        "length >= 0 && length <= capacity",
        "length >= 0",
        BAD_INPUT_TESTS,
    ),
    Mutation(
        "16 query tokens are one too many",
        VALIDATE,
        "p.num_q_tokens <= kMaxDecodeTokens",
        "p.num_q_tokens < kMaxDecodeTokens",
        ("tests/test_decode.py", "tests/test_supports.py"),
    ),
    Mutation(
        "num_splits ignored by the binding",
        BINDING,
        'read_optional_count(num_splits, kWho, "num_splits").value_or(0);',
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
        VALIDATE,
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
        VALIDATE,
        "p.page_table || p.batch_size <= p.cache.num_pages",
        "true",
        BAD_INPUT_TESTS,
    ),
    Mutation(
        "forced splits in batch-invariant mode",
        VALIDATE,
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
        BINDING,
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
        BINDING,
        "is_per_sequence ? slopes.strides[0] : 0",
        "0",
        ("tests/test_masks.py",),
    ),
    Mutation(
        "strides of first keys ignored",
        BINDING,
        "(seq_starts.data), seq_starts.strides[0]}",
        "(seq_starts.data), 1}",
        ("tests/test_layout.py",),
    ),
    Mutation(
        "columns of a page table are contiguous",
        BINDING,
        "page_table.strides[0], page_table.strides[1]}",
        "page_table.strides[0], 1}",
        ("tests/test_layout.py",),
    ),
    Mutation(
        "a resized cache is used as it was",
        BINDING,
        "cache.require_unmoved(kWho);",
        "",
        ("tests/test_cache.py", "tests/test_memory.py"),
    ),
    Mutation(
        "head_dims between the kernels' are served",
        "cpp/core/backend.h",
        " && head_dim % head_dim_multiple == 0",
        "",
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
