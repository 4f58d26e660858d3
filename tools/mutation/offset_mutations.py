"""Wrong edits of key offsets: where they are subtracted, where they are counted back in, and what is refused."""

from __future__ import annotations

from mutation.mutation import BAD_INPUT_TESTS, Mutation

CODEC = "cpp/cpu/codec.cc"
ITEM = "cpp/cpu/item_runner.cc"
SOFTMAX = "cpp/cpu/softmax.h"
OFFSET_TESTS = ("tests/test_key_offset.py",)

OFFSET_MUTATIONS = (
    Mutation(
        "key offset not subtracted at append",
        CODEC,
        "{cache.k_codes, cache.k_scale, cache.k_offset}",
        "{cache.k_codes, cache.k_scale, {}}",
        OFFSET_TESTS,
    ),
    Mutation(
        "dynamic scale of keys with their offset",
        CODEC,
        "load(values, at.offset, first, count, buffer);\n      scale =",
        "load(values, nullptr, first, count, buffer);\n      scale =",
        OFFSET_TESTS,
    ),
    Mutation("key offset of every block is the first's", CODEC, "offset[first + i]);", "offset[i]);", OFFSET_TESTS),
    Mutation("key offset not decoded", CODEC, "buffer[i] += at.offset[first + i];", "{}", OFFSET_TESTS),
    Mutation(
        "key offset dropped from the log-sum-exp",
        ITEM,
        "return max + scratch<float>(call_.layout.score_offsets)[row];",
        "return max;",
        OFFSET_TESTS,
    ),
    Mutation(
        "key offset counted in the maximum behind the soft cap",
        ITEM,
        "if (batch_.logits_soft_cap > 0.f || !batch_.has_score_offsets()",
        "if (!batch_.has_score_offsets()",
        OFFSET_TESTS,
    ),
    Mutation(
        "key offset after the soft cap",
        SOFTMAX,
        "    if (job.offsets) s += job.offsets[row];\n"
        "    if (job.soft_cap > 0.f) s = job.soft_cap * tanh_of(s / job.soft_cap);\n",
        "    if (job.soft_cap > 0.f) s = job.soft_cap * tanh_of(s / job.soft_cap);\n"
        "    if (job.offsets) s += job.offsets[row];\n",
        OFFSET_TESTS,
    ),
    Mutation(
        "key offset without sm_scale",
        ITEM,
        "batch_.sm_scale * call_.isa.stages->edge.dot_product(",
        "call_.isa.stages->edge.dot_product(",
        OFFSET_TESTS,
    ),
    Mutation(
        "key offset of KV head 0 for all",
        ITEM,
        "k_offset.at(item_.first_head + row / rows_per_head_, 0)",
        "k_offset.at(0, 0)",
        OFFSET_TESTS,
    ),
    Mutation(
        "a row without keys gets a key offset",
        ITEM,
        "|| !batch_.has_score_offsets() || max == -kInfinity)",
        "|| !batch_.has_score_offsets())",
        OFFSET_TESTS,
    ),
    Mutation(
        "key offset forgotten without a log-sum-exp",
        "cpp/cpu/attention_batch.h",
        "(logits_soft_cap > 0.f || sinks || lse)",
        "lse",
        OFFSET_TESTS,
    ),
    Mutation(
        "NaN in a key offset is not refused",
        "cpp/binding/arguments.cc",
        "!std::isfinite(view",
        "std::isinf(view",
        BAD_INPUT_TESTS,
    ),
)
