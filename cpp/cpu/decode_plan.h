#pragma once

#include <span>

#include "core/backend.h"
#include "cpu/stages.h"

namespace quantattn::cpu {

struct Isa;

// Keys [first, end) of a sequence.
struct KeyRange {
  int64_t first, end;
};

inline constexpr int64_t kCacheLine = 64;
constexpr int64_t align_up(int64_t bytes) { return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine; }

// How a plan cuts the sequences and what a run puts where in its workspace. A work item is (sequence, block of KV
// heads, part).
class DecodeSchedule {
 public:
  DecodeSchedule(const DecodeParams& params, int num_splits, int split_size);

  // Keys that query token `i` of sequence `b` sees; empty ranges have end <= first.
  KeyRange visible_to(int64_t b, int i) const;
  // Keys that any query token of the sequence sees.
  KeyRange visible(int64_t b) const;
  int64_t num_parts(int64_t b) const;
  KeyRange part(int64_t b, int64_t index, int64_t num_parts) const;

  int rows_per_head() const { return params_.num_q_heads / params_.cache.num_kv_heads * params_.num_q_tokens; }
  int heads_per_block() const { return heads_per_block_; }
  int64_t num_blocks() const { return (params_.cache.num_kv_heads + heads_per_block_ - 1) / heads_per_block_; }
  int num_heads_in(int64_t block) const;
  // Partial result of one part: rows x (padded head_dim + maximum + sum).
  int64_t partial_floats() const;

 private:
  const DecodeParams& params_;
  int num_splits_;  // 0: cut by split_size_
  int split_size_;
  int heads_per_block_;
};

// Scratch of one thread, in bytes from its start.
struct WorkerLayout {
  int64_t loaded, queries, packed_queries, units, out, max, sum, keys, values, scores, bytes;
};
WorkerLayout worker_layout(const Isa& isa, const DecodeSchedule& schedule, int head_dim);

// Workspace of a run: positions of the sequences, arrival counters, partial results, then one scratch area per thread.
struct RunLayout {
  int64_t positions, arrivals, partials, workers;
};

DecodePlan plan_decode(const DecodeParams& params, const Execution& execution, std::span<const DecodeKernel* const> candidates);
RunLayout run_layout(const DecodeParams& params, const DecodeSchedule& schedule);
int resolve_num_threads(const Execution& execution);

}  // namespace quantattn::cpu
