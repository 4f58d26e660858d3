"""Wrong edits of formats, kernels and codecs."""

from __future__ import annotations

from mutation.mutation import CODEC_TESTS, Mutation

DECODE = "cpp/cpu/decode.cc"
ITEM = "cpp/cpu/item_runner.cc"
PLAN = "cpp/cpu/decode_plan.cc"
READER = "cpp/cpu/tile_reader.cc"
SOFTMAX = "cpp/cpu/softmax.h"
FLOATS = "cpp/cpu/float32_arithmetic.h"
DIRECT = "cpp/cpu/float32_direct.h"
INTEGERS = "cpp/cpu/integer_arithmetic.h"
JOIN = "cpp/cpu/join.h"
WIDEN = "cpp/cpu/widen.h"
SOFT_CAP = "    if (job.soft_cap > 0.f) s = job.soft_cap * tanh_of(s / job.soft_cap);\n"
ALIBI = "    if (job.slopes) s += job.slopes[row] * (job.distances[row] + static_cast<float>(token) + lanes);\n"

KERNEL_MUTATIONS = (
    # Scales.
    Mutation(
        "K scale dropped",
        ITEM,
        "key_scales, value_scales);",
        "key_scales, value_scales);\n  std::fill(key_scales, key_scales + kTileTokens, 1.f);",
    ),
    Mutation(
        "V scale dropped",
        ITEM,
        "key_scales, value_scales);",
        "key_scales, value_scales);\n  std::fill(value_scales, value_scales + num_tokens, 1.f);",
    ),
    Mutation(
        "K scale used for V",
        READER,
        "params_.cache.v_scale, tile.value_scales,",
        "params_.cache.k_scale, tile.key_scales,",
    ),
    Mutation("static scale of head 0", READER, "scale.offset(0, 0, first_head_ + head)", "scale.offset(0, 0, 0)"),
    Mutation("dynamic scale of the block's first head", READER, "head * scale.head_stride * 2;", "0;"),
    Mutation(
        "token stride of scales and codes ignored",
        READER,
        "const int64_t stride = array.token_stride * element_bytes;",
        "const int64_t stride = 0 * element_bytes;",
    ),
    # Which keys are seen.
    Mutation("causal mask hides the query itself", PLAN, "return {first, position + 1};", "return {first, position};"),
    Mutation("causal mask shows the next key", PLAN, "return {first, position + 1};", "return {first, position + 2};"),
    Mutation(
        "window one key too wide", PLAN, "position - params_.sliding_window + 1)", "position - params_.sliding_window)"
    ),
    Mutation(
        "window one key too narrow",
        PLAN,
        "position - params_.sliding_window + 1)",
        "position - params_.sliding_window + 2)",
    ),
    Mutation("first visible key ignored", PLAN, "params_.seq_starts ? params_.seq_starts[b] : 0;", "0;"),
    Mutation(
        "first visible key off by one",
        PLAN,
        "params_.seq_starts ? params_.seq_starts[b] : 0;",
        "params_.seq_starts ? params_.seq_starts[b] + 1 : 0;",
    ),
    Mutation(
        "lanes past the last token count",
        SOFTMAX,
        "s = lanes < static_cast<float>(job.num_tokens - token) ? s : broadcast(-kInfinity);",
        "",
    ),
    Mutation(
        "tokens are read past the end of a tile",
        ITEM,
        "std::min<int64_t>(kTileTokens, end_key - key)",
        "std::min<int64_t>(kTileTokens, end_key - key + 1)",
    ),
    # Which bytes are read.
    Mutation("offset in the first page ignored", READER, "token = first % cache.page_size;", "token = 0;"),
    Mutation(
        "codes of the first head",
        READER,
        "array.offset(page, token, head) * element_bytes;",
        "array.offset(page, token, 0) * element_bytes;",
    ),
    Mutation(
        "32-bit page offset",
        READER,
        "array.offset(page, token, head) * element_bytes;",
        "static_cast<int32_t>(array.offset(page, token, head)) * element_bytes;",
        ("tests/test_layout.py",),
    ),
    Mutation(
        "page table ignored",
        "cpp/cpu/tile_reader.h",
        "params_.page_table ? params_.page_table.at(b_, index) : b_",
        "params_.page_table ? index + 1 : b_",
    ),
    # Heads and rows.
    Mutation(
        "query heads grouped the wrong way",
        ITEM,
        "params_.q.offset(b_, token, head * group + row % group);",
        "params_.q.offset(b_, token, row % group * params_.cache.num_kv_heads + head);",
    ),
    Mutation(
        "results return to the wrong token",
        ITEM,
        "const int64_t token = row % rows_per_head_ / group, head = (first_head_",
        "const int64_t token = params_.num_q_tokens - 1 - row % rows_per_head_ / group, head = (first_head_",
    ),
    # Scores.
    Mutation("sm_scale ignored", ITEM, "head_dim, params_.sm_scale, queries", "head_dim, 0.125f, queries"),
    Mutation(
        "ALiBi off by one",
        ITEM,
        "static_cast<float>(first_key - position)",
        "static_cast<float>(first_key - position + 1)",
    ),
    Mutation(
        "ALiBi slope of the first group",
        ITEM,
        "params_.alibi_slopes.at(b_, (first_head_ + head) * group + (row + r) % group)",
        "params_.alibi_slopes.at(b_, (row + r) % group)",
    ),
    Mutation(
        "ALiBi slopes of sequence 0",
        ITEM,
        "params_.alibi_slopes.at(b_, (first_head_",
        "params_.alibi_slopes.at(0, (first_head_",
    ),
    Mutation("soft cap ignored", SOFTMAX, "if (job.soft_cap > 0.f) s =", "if (job.soft_cap < 0.f) s ="),
    Mutation(
        "soft cap inside tanh only",
        SOFTMAX,
        "s = job.soft_cap * tanh_of(s / job.soft_cap);",
        "s = tanh_of(s / job.soft_cap);",
    ),
    Mutation("soft cap after ALiBi", SOFTMAX, SOFT_CAP + ALIBI, ALIBI + SOFT_CAP),
    # Softmax, sinks, splits.
    Mutation(
        "output not rescaled to a new maximum",
        SOFTMAX,
        "job.rescale[row] = old_max == new_max ? 1.f :",
        "job.rescale[row] = old_max != -kInfinity ? 1.f :",
    ),
    Mutation(
        "sum not rescaled to a new maximum",
        SOFTMAX,
        "job.sum[row] * job.rescale[row] + sum_of_lanes(sum)",
        "job.sum[row] + sum_of_lanes(sum)",
    ),
    Mutation("sink dropped", ITEM, "params_.sinks ? params_.sinks[head] : -kInfinity;", "-kInfinity;"),
    Mutation(
        "sink counted once per split",
        ITEM,
        "+ std::exp(sink - max);",
        "+ static_cast<float>(call_.schedule.num_parts(b_)) * std::exp(sink - max);",
    ),
    Mutation("sink of another head", ITEM, "params_.sinks[head]", "params_.sinks[head % group]"),
    Mutation("LSE in base 2", ITEM, "lse = max + std::log(sum);", "lse = max + std::log2(sum);"),
    Mutation("LSE without its maximum", ITEM, "lse = max + std::log(sum);", "lse = std::log(sum);"),
    Mutation(
        "a split skipped",
        JOIN,
        "max[i] = first + i < job.num_parts ?",
        "max[i] = first + i + 1 < job.num_parts ?",
    ),
    Mutation("splits added without their weights", JOIN, "joined += weights[part] * load", "joined += load"),
    Mutation(
        "a NaN of one part is lost in the join",
        JOIN,
        "sum += weights[part] *",
        "sum += weights[part] == 0.f ? 0.f : weights[part] *",
    ),
    Mutation("queries of the block before", ITEM, "loaded().b == b_ && loaded().block == block_", "loaded().b == b_"),
    Mutation(
        "queries of the sequence before",
        ITEM,
        "loaded().b == b_ && loaded().block == block_",
        "loaded().block == block_",
    ),
    Mutation(
        "split results of sequence 0",
        DECODE,
        "sequence->first_partial + block * num_parts;",
        "block * num_parts;",
    ),
    Mutation(
        "split size depends on the batch",
        PLAN,
        "plan.split_size = kBatchInvariantSplit;",
        "plan.split_size = static_cast<int>(std::max<int64_t>(num_keys / 16, kMinSplit));",
        ("tests/test_reproducibility.py",),
    ),
    Mutation(
        "forced instruction set ignored",
        PLAN,
        "execution.kernel.empty() ? preferred_isa() : isa_named(execution.kernel)",
        "preferred_isa()",
        ("tests/test_instruction_sets.py::test_every_instruction_set_matches_the_reference",),
    ),
    Mutation(
        "a forked child waits for its parent's threads",
        "cpp/cpu/openmp_team.cc",
        " || is_forked_child.load(std::memory_order_relaxed)",
        "",
        ("tests/test_concurrency.py",),
    ),
    Mutation(
        "threads of its own beside torch's",
        "cpp/cpu/thread_pool.cc",
        "useful > 1 && run_on_openmp_team(",
        "false && run_on_openmp_team(",
        ("tests/test_concurrency.py",),
    ),
    # Arithmetic.
    Mutation(
        "float32 scores lose the K scale",
        FLOATS,
        "dot * job.keys->unit * load(job.key_scales + token)",
        "dot * job.keys->unit",
        ("tests/test_instruction_sets.py",),
    ),
    Mutation("accumulator overwritten", FLOATS, "store(out, load(out) * job.rescale[row] + sum *", "store(out, sum *"),
    Mutation(
        "float32 scores without an operand lose the K scale",
        DIRECT,
        "Widen<Format>::kUnit * load(job.key_scales + token)",
        "Widen<Format>::kUnit",
        ("tests/test_instruction_sets.py",),
    ),
    Mutation(
        "int8 scores lose the K scale",
        "cpp/cpu/int8_direct.h",
        "dot * load(job.key_scales + token)",
        "dot",
    ),
    Mutation("int8 columns stay shuffled", "cpp/cpu/int8_direct.h", "N::order_quarters(totals);", "{}"),
    Mutation(
        "bfloat16 weights of 8 bits",
        "cpp/cpu/bfloat16_direct.h",
        "add_products(sums[r][q], quarters[q], second);",
        "(void)second;",
    ),
    Mutation(
        "bfloat16 queries of 8 bits",
        "cpp/cpu/bfloat16_arithmetic.h",
        "bfloat16_bits(rest == rest ? rest : F32{})",
        "bfloat16_bits(F32{})",
    ),
    Mutation(
        "accumulator without an operand overwritten",
        DIRECT,
        "load(out + c * kLanes) * job.rescale[first_row + row] +",
        "",
    ),
    Mutation("integer keys lose their offset's correction", INTEGERS, "header->correction += 128 * sum[lane];", "{}"),
    Mutation(
        "integer queries of 8 bits",
        INTEGERS,
        "magnitude_of(queries, head_dim), 32639.f, header)",
        "magnitude_of(queries, head_dim), 127.f, header)",
    ),
    Mutation(
        "E4M3 widened with the wrong bias",
        WIDEN,
        "kUnit = 0x1p8f;",
        "kUnit = 0x1p7f;",
        ("tests/test_instruction_sets.py",),
    ),
    Mutation("E5M2 read as E4M3", "cpp/formats/fp8_e5m2.h", "(code << 8)", "(code << 7)", CODEC_TESTS),
    # Formats.
    Mutation(
        "dynamic scale rounded to nearest",
        "cpp/formats/scale.h",
        "half_not_below(amax /",
        "half_of_float(amax /",
        CODEC_TESTS,
    ),
    Mutation(
        "infinity sets the scale",
        "cpp/formats/scale.h",
        "return magnitude < 0x7F800000u ?",
        "return magnitude <= 0x7F800000u ?",
        CODEC_TESTS,
    ),
    Mutation("int8 rounds towards zero", "cpp/formats/int8.h", "rintf(clamped)", "clamped", CODEC_TESTS),
    Mutation("int8 uses -128", "cpp/formats/int8.h", "x < -kMaxCode ? -kMaxCode", "x < -128.f ? -128.f", CODEC_TESTS),
    Mutation(
        "E4M3 overflows to NaN",
        "cpp/formats/fp8_e4m3.h",
        "(sign | 0x7Eu);  // 448 and above",
        "(sign | 0x7Fu);",
        CODEC_TESTS,
    ),
    Mutation(
        "E4M3 rounds half up",
        "cpp/formats/fp8_e4m3.h",
        "magnitude + 0x7FFFFu + (magnitude >> 20 & 1u)",
        "magnitude + 0x80000u",
        CODEC_TESTS,
    ),
    Mutation("E5M2 saturates to infinity", "cpp/formats/fp8_e5m2.h", "(sign | 0x7Bu);", "(sign | 0x7Cu);", CODEC_TESTS),
    Mutation(
        "float16 rounds half up",
        "cpp/formats/float_bits.h",
        "magnitude + 0xFFFu + (magnitude >> 13 & 1u)",
        "magnitude + 0x1000u",
        CODEC_TESTS,
    ),
    Mutation(
        "bfloat16 truncates",
        "cpp/formats/float_bits.h",
        "(bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16",
        "bits >> 16",
        CODEC_TESTS,
    ),
)
