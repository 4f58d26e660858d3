"""Wrong edits of formats, kernels and codecs."""

from __future__ import annotations

from mutation.mutation import CODEC_TESTS, Mutation

ATTENTION = "cpp/cpu/attention.cc"
BATCH = "cpp/cpu/attention_batch.cc"
ITEM = "cpp/cpu/item_runner.cc"
JOIN = "cpp/cpu/join.h"
PLAN = "cpp/cpu/attention_plan.cc"
READER = "cpp/cpu/tile_reader.cc"
SOFTMAX = "cpp/cpu/softmax.h"
FLOATS = "cpp/cpu/float32_arithmetic.h"
DIRECT = "cpp/cpu/float32_direct.h"
INTEGERS = "cpp/cpu/integer_arithmetic.h"
WIDEN = "cpp/cpu/widen.h"
SCALES = "reader_.load_scales(edge, rows, head, tile.key_scales, tile.value_scales);"
SOFT_CAP = "    if (job.soft_cap > 0.f) s = job.soft_cap * tanh_of(s / job.soft_cap);\n"
ALIBI = "    if (job.slopes) s += job.slopes[row] * (job.distances[row] + static_cast<float>(token) + lanes);\n"

KERNEL_MUTATIONS = (
    # Scales.
    Mutation(
        "K scale dropped",
        ITEM,
        SCALES,
        SCALES + "\n  std::fill(tile.key_scales, tile.key_scales + kTileTokens, batch_.sm_scale);",
    ),
    Mutation(
        "V scale dropped",
        ITEM,
        SCALES,
        SCALES + "\n  std::fill(tile.value_scales, tile.value_scales + rows.num_tokens, 1.f);",
    ),
    Mutation(
        "K scale used for V",
        READER,
        "batch_.cache.v_scale, tile.value_scales,",
        "batch_.cache.k_scale, tile.key_scales,",
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
    Mutation("causal mask hides the query itself", BATCH, "causal ? position + 1 :", "causal ? position :"),
    Mutation("causal mask shows the next key", BATCH, "causal ? position + 1 :", "causal ? position + 2 :"),
    Mutation("window one key too wide", BATCH, "position - sliding_window + 1)", "position - sliding_window)"),
    Mutation("window one key too narrow", BATCH, "position - sliding_window + 1)", "position - sliding_window + 2)"),
    Mutation("first visible key ignored", BATCH, "seq_starts ? seq_starts[b] : 0;", "0;"),
    Mutation(
        "first visible key off by one",
        BATCH,
        "seq_starts ? seq_starts[b] : 0;",
        "seq_starts ? seq_starts[b] + 1 : 0;",
    ),
    Mutation(
        "lanes past the last token count",
        SOFTMAX,
        "x = lanes < static_cast<float>(visible.end - token) ? x : otherwise;",
        "",
    ),
    Mutation(
        "tokens are read past the end of a tile",
        ITEM,
        "std::min<int64_t>(kTileTokens, keys.end - key)",
        "std::min<int64_t>(kTileTokens, keys.end - key + 1)",
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
        "batch_.page_table ? batch_.page_table.at(b_, index) : b_",
        "batch_.page_table ? index + 1 : b_",
    ),
    # Heads and rows.
    Mutation(
        "query heads grouped the wrong way",
        ITEM,
        "token, head * group_ + row % group_);",
        "token, row % group_ * batch_.cache.num_kv_heads + head);",
    ),
    Mutation(
        "results return to the wrong token",
        ITEM,
        "const int64_t token = item_.first_token + row %",
        "const int64_t token = item_.first_token + item_.num_tokens - 1 - row %",
    ),
    # Scores.
    Mutation("sm_scale ignored", READER, "batch_.sm_scale, key_scales);", "0.125f, key_scales);"),
    Mutation(
        "ALiBi off by one",
        ITEM,
        "static_cast<float>(tile.first_key - position)",
        "static_cast<float>(tile.first_key - position + 1)",
    ),
    Mutation(
        "ALiBi slope of the first group",
        ITEM,
        "(item_.b, (item_.first_head + tile.head) * group_ + (row + r) % group_)",
        "(item_.b, (row + r) % group_)",
    ),
    Mutation(
        "ALiBi slopes of sequence 0",
        ITEM,
        "batch_.alibi_slopes.at(item_.b,",
        "batch_.alibi_slopes.at(0,",
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
    Mutation("sink dropped", ITEM, "batch_.sinks ? batch_.sinks[head] : -kInfinity;", "-kInfinity;"),
    Mutation(
        "sink counted once per split",
        ITEM,
        "+ std::exp(sink - max);",
        "+ static_cast<float>(call_.schedule.work_of(item_.b).num_parts) * std::exp(sink - max);",
    ),
    Mutation("sink of another head", ITEM, "batch_.sinks[head]", "batch_.sinks[head % group_]"),
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
    Mutation("queries of the heads before", ITEM, " && loaded().first_head == item_.first_head", ""),
    Mutation("queries of the sequence before", ITEM, "loaded().b == item_.b && ", ""),
    Mutation(
        "split results of sequence 0",
        ATTENTION,
        "partials + work.first_partial + index",
        "partials + index",
    ),
    Mutation(
        "split size depends on the batch",
        PLAN,
        "plan->split_size = kBatchInvariantSplit;",
        "plan->split_size = chosen_split(size, num_threads);",
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
