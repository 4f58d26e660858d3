"""Wrong edits of the CUDA kernels for prompts, and of which sequences of a hybrid batch they take."""

from __future__ import annotations

from mutation.mutation import CudaMutation

ENGINE = "cuda/prefill/engine.cuh"
HOPPER = "cuda/prefill/hopper_consumer.cuh"
HOPPER_GUARD = "cuda/prefill/hopper_guard.cuh"
HOPPER_PRODUCER = "cuda/prefill/hopper_producer.cuh"
HOPPER_ROWS = "cuda/prefill/hopper_rows.cuh"
HOPPER_SCALES = "cuda/prefill/hopper_scales.cuh"
HOPPER_SCORES = "cuda/prefill/hopper_scores.cuh"
HOPPER_WIDENER = "cuda/prefill/hopper_widener.cuh"
KEYS = "cuda/prefill/key_tiles.cuh"
ROWS = "cuda/prefill/row_constants.cuh"
TILE = "cuda/prefill/row_tile.cuh"
CACHE_TESTS = (
    "tests/test_hybrid.py",
    "tests/test_ragged_memory.py",
    "tests/test_visible_nan.py",
    "tests/test_key_offset.py",
)
BOX_TESTS = ("tests/test_kernel_choice.py::test_the_hopper_kernel_reads_pages_of_any_number_of_eight_tokens",)
FRESH_TESTS = ("tests/test_prefill.py", "tests/test_ragged_memory.py", "tests/test_visible_nan.py")
BORDER_TESTS = ("tests/test_hybrid.py::test_e1_every_number_of_query_tokens",)

CUDA_PREFILL_MUTATIONS = (
    # The portable kernel: scales.
    CudaMutation(
        "prefill: K scale of the neighbour", ENGINE, "? scale.x : scale.y;", "? scale.x : scale.x;", CACHE_TESTS
    ),
    CudaMutation(
        "prefill: V scale of the neighbour",
        ENGINE,
        "w[i] *= i % 2 == 0 ? v_scale.x : v_scale.y;",
        "w[i] *= v_scale.x;",
        CACHE_TESTS,
    ),
    CudaMutation(
        "prefill: output not rescaled to a larger V scale",
        ENGINE,
        "= old_unit * inverse_value_unit();",
        "= 1.f;",
        CACHE_TESTS,
    ),
    CudaMutation(
        "prefill: token scale of head 0",
        KEYS,
        "scale.offset(page, in_page, rows_.kv_head)",
        "scale.offset(page, in_page, 0)",
        CACHE_TESTS,
    ),
    # Which keys are seen.
    CudaMutation(
        "prefill: causal mask shows the next key",
        ENGINE,
        "if (key > own.last_key - own_key)",
        "if (key > own.last_key + 1 - own_key)",
        CACHE_TESTS,
    ),
    CudaMutation(
        "prefill: window one key too wide",
        ENGINE,
        "if (key < own.first_key - own_key)",
        "if (key < own.first_key - 1 - own_key)",
        CACHE_TESTS,
    ),
    CudaMutation(
        "prefill: the last tile of keys skipped",
        KEYS,
        "(rows_.end_key - rows_.first_key + kKeys - 1) / kKeys",
        "(rows_.end_key - rows_.first_key) / kKeys",
        CACHE_TESTS,
    ),
    CudaMutation(
        "prefill: page table of sequence 0",
        KEYS,
        "&task_.page_table.at(rows_.sequence, column)",
        "&task_.page_table.at(0, column)",
        CACHE_TESTS,
    ),
    CudaMutation(
        "prefill: place in a page ignored", KEYS, "in_page = place_in_page(key);", "in_page = 0;", CACHE_TESTS
    ),
    CudaMutation(
        "prefill: rows of a tile that sees one key pass it by",
        ENGINE,
        "first_key + kKeysPerTile > rows_[0].first_key;",
        "first_key + kKeysPerTile > rows_[0].first_key + 1;",
        CACHE_TESTS,
    ),
    # Softmax, sinks, values that are not finite.
    CudaMutation("prefill: sum not rescaled to a new maximum", ENGINE, "sum_[m][i] *= rescale;", "{}", CACHE_TESTS),
    CudaMutation(
        "prefill: sink dropped", ROWS, "if (!task.sinks) return", "if (!task.sinks || task.sinks) return", CACHE_TESTS
    ),
    CudaMutation("prefill: LSE in base 2", ROWS, "maximum * kLn2 + logf(sum)", "maximum + logf(sum)", CACHE_TESTS),
    CudaMutation(
        "prefill: key offset dropped from the log-sum-exp",
        ROWS,
        "if (task.logits_soft_cap == 0.f) maximum += row.offset;",
        "",
        CACHE_TESTS,
    ),
    CudaMutation(
        "prefill: hidden values multiplied by zero",
        KEYS,
        "__syncthreads_or(has_bad_values(tile))",
        "__syncthreads_or(false)",
        CACHE_TESTS,
    ),
    CudaMutation("prefill: rows that see a bad value are not told", ENGINE, "own.is_spoilt = true;", "{}", CACHE_TESTS),
    # Which sequences of a hybrid batch the prefill kernels take.
    CudaMutation(
        "prefill: sequences of the fewest query tokens left out",
        TILE,
        "lengths.tokens.size >= task.fewest_tokens",
        "lengths.tokens.size > task.fewest_tokens",
        BORDER_TESTS,
    ),
    CudaMutation(
        "prefill: the last row tile of a sequence skipped",
        TILE,
        "counts ? (rows + block_rows - 1) / block_rows : 0",
        "counts ? rows / block_rows : 0",
        BORDER_TESTS,
    ),
    # The Hopper kernel.
    CudaMutation(
        "Hopper: causal mask shows the next key",
        HOPPER_SCORES,
        "key > last ?",
        "key > last + 1 ?",
        FRESH_TESTS,
    ),
    CudaMutation(
        "Hopper: the last tile that some rows see in part not masked",
        HOPPER,
        "i < first_plain_ || i >= end_plain_",
        "i + 1 < first_plain_ || i >= end_plain_",
        FRESH_TESTS,
    ),
    CudaMutation(
        "Hopper: the first tile of a window not masked",
        HOPPER,
        "i < first_plain_ || i >= end_plain_",
        "i < first_plain_ || i > end_plain_",
        FRESH_TESTS,
    ),
    CudaMutation("Hopper: window one key too wide", HOPPER_SCORES, "key < first ?", "key + 1 < first ?", FRESH_TESTS),
    CudaMutation(
        "Hopper: output not rescaled to a new maximum", HOPPER, "if (raised) rescale_output();", "", FRESH_TESTS
    ),
    CudaMutation("Hopper: sum not rescaled to a new maximum", HOPPER, "sum_[h] *= rescale_[h];", "{}", FRESH_TESTS),
    CudaMutation(
        "Hopper: ALiBi off by one",
        HOPPER_SCORES,
        "distance + static_cast<float>(key)",
        "distance + static_cast<float>(key + 1)",
        FRESH_TESTS,
    ),
    CudaMutation(
        "Hopper: soft cap in base 2",
        HOPPER_SCORES,
        "outer = task.logits_soft_cap * kLog2e;",
        "outer = task.logits_soft_cap;",
        FRESH_TESTS,
    ),
    CudaMutation(
        "Hopper: hidden values multiplied by zero",
        HOPPER_GUARD,
        "if (!has_bad_value<Shape::kIsBf16>(x[j])) continue;",
        "if (true) continue;",
        FRESH_TESTS,
    ),
    CudaMutation(
        "Hopper: rows that see a bad value are not told", HOPPER, "row(h).is_spoilt = true;", "{}", FRESH_TESTS
    ),
    CudaMutation(
        "Hopper: a row divided by the sum of the row eight above",
        HOPPER,
        "__shfl_sync(0xFFFFFFFFu, multiplier, lane / 4 + 8)",
        "__shfl_sync(0xFFFFFFFFu, multiplier, lane / 4)",
        FRESH_TESTS,
    ),
    CudaMutation(
        "Hopper: rows read and written where the rows eight above lie",
        HOPPER_ROWS,
        "return first_row + lane % 16;",
        "return first_row + lane % 8;",
        FRESH_TESTS,
    ),
    # What the Hopper kernel copies.
    CudaMutation(
        "Hopper: keys and values of head 0", HOPPER_PRODUCER, "head_(rows_.kv_head * (", "head_(0 * (", BOX_TESTS
    ),
    CudaMutation(
        "Hopper: heads one block of channels apart",
        HOPPER_PRODUCER,
        "(are_values ? task.v_head_step : task.k_head_step)",
        "1",
        BOX_TESTS,
    ),
    CudaMutation(
        "Hopper: page of the box that has the lane's number",
        HOPPER_PRODUCER,
        "own_page, copied);",
        "page, copied);",
        BOX_TESTS,
    ),
    CudaMutation(
        "Hopper: hidden values cleared where boxes of single blocks would lie",
        HOPPER_GUARD,
        "operand_offset(strides_, i / kChunks",
        "operand_offset(kBlockAfterBlock<Shape::kKeys>, i / kChunks",
        BOX_TESTS,
    ),
    # The Hopper kernel over caches of 8 bits.
    CudaMutation(
        "Hopper: token scales of head 0", HOPPER_SCALES, "tokens_[j], rows_.kv_head)", "tokens_[j], 0)", CACHE_TESTS
    ),
    CudaMutation(
        "Hopper: scales of the first sequence's pages",
        HOPPER_SCALES,
        "task_.page_table.at(rows_.sequence, column)",
        "task_.page_table.at(0, column)",
        CACHE_TESTS,
    ),
    CudaMutation(
        "Hopper: K scale of the neighbour", HOPPER, "j % 2 == 0 ? scale.x : scale.y;", "scale.x;", CACHE_TESTS
    ),
    CudaMutation(
        "Hopper: output not rescaled to a larger V scale",
        HOPPER,
        "if (unit_rescale != 1.f) {",
        "if (false) {",
        CACHE_TESTS,
    ),
    CudaMutation(
        "Hopper: V scale of the first key",
        HOPPER_WIDENER,
        ".v[thread_of_warpgroup() % kKeys]",
        ".v[0]",
        CACHE_TESTS,
    ),
    CudaMutation(
        "Hopper: second half of 256 codes stored over the first",
        HOPPER_WIDENER,
        "part * (kChunks / 4 * kKeys * kBlockRowBytes)",
        "0 * (part + kChunks)",
        CACHE_TESTS,
    ),
    CudaMutation(
        "Hopper: bound of the V scales one octave too low",
        HOPPER_SCALES,
        "& 0x7F800000u) + 0x00800000u",
        "& 0x7F800000u)",
        CACHE_TESTS,
    ),
    CudaMutation(
        "Hopper: hidden codes multiplied by zero",
        HOPPER_WIDENER,
        "(!is_live || (keys.is_scanned && is_bad_chunk(wide[j])))",
        "!is_live",
        CACHE_TESTS,
    ),
)
