#pragma once

#include "cpu/decode_plan.h"
#include "cpu/tile_reader.h"

namespace quantattn::cpu {

// What the items of one call share.
struct DecodeCall {
  const DecodeParams& params;
  const DecodeSchedule& schedule;
  const Isa& isa;
  WorkerLayout layout;

  int group() const { return params.num_q_heads / params.cache.num_kv_heads; }
  int padded_head_dim() const { return round_up(params.cache.head_dim, kLanePadding); }
};

// The queries in a thread's scratch. They stay there from item to item, since a thread often gets several parts of one
// sequence.
struct LoadedQueries {
  int64_t b = -1, block = -1;  // -1: none
  bool has_units = false;
  Arithmetic packed_for = Arithmetic::kFloat32;
  int packed_limit = -1;  // largest integer of the keys that the packed queries are for; -1: nothing is packed
};

// Attention of one block of KV heads of one sequence over a range of keys, on one thread. Rows are ordered by KV head, then
// query token, then query head of the KV head. Tiles of tokens are the outer loop and heads the inner one: a page of the
// cache, and of the machine's memory, is visited once for all heads.
class ItemRunner {
 public:
  ItemRunner(const DecodeCall& call, int64_t b, int64_t block, char* scratch);
  // Where an item puts its result that nobody else needs.
  PartialResult own_result() const;
  void attend(KeyRange keys, const PartialResult& result);
  // Divides by the sums, adds the sinks and writes out and lse.
  void finish(const PartialResult& result) const;
  int64_t num_rows() const { return int64_t{num_heads_} * rows_per_head_; }

 private:
  LoadedQueries& loaded() const { return *scratch<LoadedQueries>(call_.layout.loaded); }
  void load_queries();
  const char* packed_queries(const Operand& keys);
  // The largest unit that keys with such scales may be rounded to.
  float coarsest_unit(int64_t head, ScaleRange scales);
  // Rows [first_row, first_row + num_rows) of every head against keys that each of them sees.
  void attend_keys(int first_row, int num_rows, int64_t first_key, int64_t end_key);
  void attend_tile(int64_t head, int first_row, int num_rows, int64_t first_key, const TileRows& tile, const TileRows& next);
  void softmax(int64_t head, int row, int count, int64_t first_key, int num_tokens, const float* value_scales, float* rescale);
  void finish_row(const PartialResult& result, int64_t row) const;
  template <class T>
  T* scratch(int64_t offset) const {
    return reinterpret_cast<T*>(scratch_ + offset);
  }

  const DecodeCall& call_;
  const DecodeParams& params_;
  int64_t b_, block_, first_head_;
  int num_heads_, rows_per_head_;
  char* scratch_;
  TileReader reader_;
  PartialResult result_{};
};

}  // namespace quantattn::cpu
