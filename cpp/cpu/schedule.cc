#include "cpu/schedule.h"

#include <algorithm>

#include "cpu/isa_table.h"
#include "cpu/item_runner.h"

namespace quantattn::cpu {
namespace {

// Query rows of an item with few query tokens: as many KV heads as keep the rows' accumulators well within a 256 KB
// second-level cache.
constexpr int kFewRows = 64;
// Most query rows of an item with many query tokens, unless one token has more: unpacking a tile costs about as much as
// multiplying 15 of them, and their queries and accumulators must stay within the second-level cache.
constexpr int kManyRows = 288;

WorkerLayout worker_layout(const AttentionBatch& batch, const Isa& isa, int64_t rows, int64_t heads, bool has_long_items) {
  const int head_dim = batch.cache.head_dim, padded = round_up(head_dim, kLanePadding);
  int64_t packed_row_bytes = 0;
  for (const ArithmeticStages& stages : isa.stages->arithmetics)
    if (stages.pack_queries) packed_row_bytes = std::max(packed_row_bytes, stages.query_row_bytes(head_dim));
  WorkerLayout layout{};
  const auto place = [&layout](int64_t bytes) {
    const int64_t start = layout.bytes;
    layout.bytes += align_up(bytes);
    return start;
  };
  layout.loaded = place(sizeof(LoadedQueries));
  layout.queries = place(rows * head_dim * 4);
  layout.score_offsets = place(rows * 4);
  layout.packed_queries = place(rows * packed_row_bytes);
  layout.units = place(heads * 4);
  layout.out = place(rows * padded * 4);
  layout.max = place(rows * 4);
  layout.sum = place(rows * 4);
  layout.part_floats = (layout.bytes - layout.out) / 4;
  if (has_long_items) place(layout.part_floats * 4);
  layout.keys = place(int64_t{kTileTokens} * padded * 4);
  layout.values = place(int64_t{kTileTokens} * padded * 4);
  layout.scores = place(int64_t{kRowBlock} * kTileTokens * 4);
  return layout;
}

}  // namespace

SequenceWork Schedule::work_of(int64_t b) const {
  const Sequence sequence = batch_.sequence(b);
  SequenceWork work{};
  work.b = b;
  work.num_q_tokens = sequence.num_q_tokens;
  work.num_parts = 1;
  if (sequence.num_q_tokens > kMaxDecodeTokens) {
    const int most_tokens = std::max(kManyRows / batch_.group(), 1);
    const int64_t num_blocks = divide_up(sequence.num_q_tokens, most_tokens);
    work.tokens_per_block = static_cast<int>(divide_up(sequence.num_q_tokens, num_blocks));
    work.heads_per_block = 1;
  } else if (sequence.num_q_tokens > 0) {
    const int rows_per_head = sequence.num_q_tokens * batch_.group();
    work.tokens_per_block = sequence.num_q_tokens;
    work.heads_per_block = std::clamp(kFewRows / rows_per_head, 1, batch_.cache.num_kv_heads);
    const KeyRange keys = batch_.visible_to(sequence, 0, sequence.num_q_tokens);
    const int64_t num_keys = std::max<int64_t>(keys.end - keys.first, 1);
    work.num_parts = num_splits_ > 0 ? std::min<int64_t>(num_splits_, num_keys) : divide_up(num_keys, split_size_);
  } else {
    return work;  // no items
  }
  work.num_token_blocks = divide_up(sequence.num_q_tokens, work.tokens_per_block);
  work.num_head_blocks = divide_up(batch_.cache.num_kv_heads, work.heads_per_block);
  return work;
}

KeyRange Schedule::part(KeyRange keys, int64_t index, int64_t num_parts) const {
  if (num_parts == 1) return keys;
  const int64_t size = num_splits_ > 0 ? divide_up(keys.end - keys.first, num_parts) : split_size_;
  const int64_t first = keys.first + index * size;
  return {first, std::min(first + size, keys.end)};
}

WorkItem Schedule::item(const SequenceWork& work, int64_t index) const {
  const int64_t part_index = index % work.num_parts, block = index / work.num_parts;
  // All blocks of tokens follow one another for one block of heads, whose keys stay in the caches. The last query tokens see
  // most keys: they come first, so that the items left at the end are small.
  const int64_t token_block = work.num_token_blocks - 1 - block % work.num_token_blocks;
  WorkItem item{};
  item.b = work.b;
  item.sequence = batch_.sequence(work.b);
  item.first_token = token_block * work.tokens_per_block;
  item.num_tokens = static_cast<int>(std::min<int64_t>(work.tokens_per_block, work.num_q_tokens - item.first_token));
  item.first_head = block / work.num_token_blocks * work.heads_per_block;
  item.num_heads = static_cast<int>(std::min<int64_t>(work.heads_per_block, batch_.cache.num_kv_heads - item.first_head));
  item.keys = part(batch_.visible_to(item.sequence, item.first_token, item.num_tokens), part_index, work.num_parts);
  item.has_many_tokens = work.has_many_tokens();
  return item;
}

int64_t Schedule::partial_floats(const SequenceWork& work) const {
  return int64_t{max_rows(work)} * (round_up(batch_.cache.head_dim, kLanePadding) + 2);
}

RunLayout run_layout(const AttentionBatch& batch, const Schedule& schedule, const Isa& isa) {
  int64_t num_floats = 0, rows = 0, heads = 0;
  bool has_long_items = false;
  RunLayout layout{};
  layout.max_parts = 1;
  for (int64_t b = 0; b < batch.batch_size; ++b) {
    const SequenceWork work = schedule.work_of(b);
    const int64_t sequence_rows = schedule.max_rows(work);
    layout.num_items += work.num_items();
    layout.max_parts = std::max(layout.max_parts, work.num_parts);
    layout.num_long += work.has_many_tokens();
    layout.num_arrivals += work.num_arrivals();
    num_floats += work.num_partials() * schedule.partial_floats(work);
    rows = std::max(rows, sequence_rows);
    heads = std::max<int64_t>(heads, work.heads_per_block);
    has_long_items = has_long_items || (work.has_many_tokens() && batch.sequence(b).length > kMaxSplit);
  }
  layout.arrivals = align_up(batch.batch_size * static_cast<int64_t>(sizeof(SequenceWork)));
  layout.partials = layout.arrivals + align_up(layout.num_arrivals * 4);
  layout.workers = layout.partials + align_up(num_floats * 4);
  layout.worker = worker_layout(batch, isa, rows, heads, has_long_items);
  return layout;
}

}  // namespace quantattn::cpu
