#pragma once

#include <algorithm>

#include "cpu/attention_batch.h"
#include "cpu/stages.h"

namespace quantattn::cpu {

struct Isa;

// Sums over at most this many tokens run on in float32; longer ones are merged from parts, so that rounding does not pile up.
inline constexpr int kMaxSplit = 8192;
inline constexpr int kBatchInvariantSplit = 1024;

constexpr int64_t align_up(int64_t bytes) { return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes; }
constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// How one sequence is cut into work items: (block of query tokens) x (block of KV heads) x (part of the keys). A sequence with
// few query tokens has one block of them, many KV heads in an item and its keys in parts, whose results are merged; one with
// many has blocks of tokens, each for one KV head and all its keys.
struct SequenceWork {
  int64_t b;
  int num_q_tokens, tokens_per_block, heads_per_block;
  int64_t num_token_blocks, num_head_blocks, num_parts;
  int64_t first_item, first_partial, first_arrival;  // among all sequences; set by the run

  bool has_many_tokens() const { return num_q_tokens > kMaxDecodeTokens; }
  int64_t num_items() const { return num_token_blocks * num_head_blocks * num_parts; }
  int64_t num_partials() const { return num_parts > 1 ? num_items() : 0; }
  int64_t num_arrivals() const { return num_parts > 1 ? num_head_blocks : 0; }
};

// Some query tokens and KV heads of one sequence, and the keys to attend to, for one thread. Its query rows are ordered by KV
// head, then query token, then query head of the KV head.
struct WorkItem {
  int64_t b;
  Sequence sequence;
  int64_t first_token, first_head;
  int num_tokens, num_heads;
  KeyRange keys;
  bool has_many_tokens;
};

// How a call cuts its sequences.
class Schedule {
 public:
  // By `num_splits`, or where that is 0 into parts of `split_size` keys.
  Schedule(const AttentionBatch& batch, int num_splits, int split_size)
      : batch_(batch), num_splits_(num_splits), split_size_(split_size) {}

  SequenceWork work_of(int64_t b) const;
  WorkItem item(const SequenceWork& work, int64_t index) const;
  // Query rows of the largest item of a sequence.
  int max_rows(const SequenceWork& work) const { return work.tokens_per_block * batch_.group() * work.heads_per_block; }
  // A part's result: rows x (padded head_dim + maximum + sum).
  int64_t partial_floats(const SequenceWork& work) const;

 private:
  KeyRange part(KeyRange keys, int64_t index, int64_t num_parts) const;

  const AttentionBatch& batch_;
  int num_splits_;  // 0: cut by split_size_
  int split_size_;
};

// Scratch of one thread, in bytes from its start. A second part of a long sequence has its result `part_floats` behind the
// first's.
struct WorkerLayout {
  int64_t loaded, queries, score_offsets, packed_queries, units, out, max, sum, keys, values, scores, bytes;
  int64_t part_floats;
};

// Workspace of a run, in bytes from its start: the work of each sequence, arrival counters, partial results, then one scratch
// area per thread.
struct RunLayout {
  int64_t works, arrivals, partials, workers;
  WorkerLayout worker;
  int64_t num_items, num_arrivals, max_parts;
  int64_t num_long;  // sequences with many query tokens

  int64_t bytes_for(int64_t num_threads) const {
    return num_items == 0 ? 0 : workers + std::min(num_threads, num_items) * worker.bytes;
  }
};
RunLayout run_layout(const AttentionBatch& batch, const Schedule& schedule, const Isa& isa);

}  // namespace quantattn::cpu
