#pragma once

#include "cpu/isa_table.h"
#include "cpu/schedule.h"
#include "cpu/tile_reader.h"

namespace quantattn::cpu {

// What the items of one call share.
struct AttentionCall {
  const AttentionBatch& batch;
  const Schedule& schedule;
  const Isa& isa;
  WorkerLayout layout;

  int padded_head_dim() const { return round_up(batch.cache.head_dim, kLanePadding); }
};

// The queries in a thread's scratch. They stay there from item to item, since a thread often gets several parts of one
// sequence.
struct LoadedQueries {
  int64_t b = -1, first_token = -1, first_head = -1;  // -1: none
  bool has_units = false;
  Arithmetic packed_for = Arithmetic::kFloat32;
  int packed_limit = -1;  // largest integer of the keys that the packed queries are for; -1: nothing is packed
};

// Attention of one work item, on one thread. Tiles of tokens are the outer loop and heads the inner one: a page of the cache,
// and of the machine's memory, is visited once for all heads.
class ItemRunner {
 public:
  ItemRunner(const AttentionCall& call, const WorkItem& item, char* scratch);
  // Where an item puts its result that nobody else needs.
  PartialResult own_result() const;
  void attend(const PartialResult& result);
  // Divides by the sums, adds the sinks and writes out and lse.
  void finish(const PartialResult& result);
  int64_t num_rows() const { return int64_t{item_.num_heads} * rows_per_head_; }

 private:
  // Consecutive query rows of each head.
  struct RowRange {
    int first, end;
  };
  // A tile of one head, ready to be multiplied.
  struct LoadedTile {
    int64_t head, first_key;
    CodeTile key_codes, value_codes;
    Operand keys, values;  // not read where the codes are multiplied directly
    bool keys_are_direct, values_are_direct, has_negative_scale;
    alignas(kLineBytes) float key_scales[kTileTokens], value_scales[kTileTokens];
  };

  LoadedQueries& loaded() const { return *scratch<LoadedQueries>(call_.layout.loaded); }
  void load_queries();
  void load_score_offsets() const;
  const char* packed_queries(const Operand& keys);
  // The largest unit that keys with such scales may be rounded to.
  float coarsest_unit(int64_t head, ScaleRange scales);
  const FormatStages& key_stages() const { return *call_.isa.formats[batch_.key_stages]; }
  const FormatStages& value_stages() const { return *call_.isa.formats[batch_.value_stages]; }
  KeyRange visible_to(int64_t token) const { return batch_.visible_to(item_.sequence, item_.first_token + token); }

  void clear_result() const;
  void attend_few_tokens();
  void attend_many_tokens();
  // All rows against keys that each of them sees.
  void attend_common(KeyRange keys);
  // All rows against those of the keys that each of them sees; no other key, however poisoned, touches a row.
  void attend_visible(KeyRange keys);
  // Calls attend(first_key, tile, next tile) for every tile of a range of keys.
  template <class Attend>
  void for_each_tile(KeyRange keys, const Attend& attend);
  // The first row for whose visible keys holds(keys) is true, and for all later ones.
  template <class Holds>
  int first_row_where(const Holds& holds) const;

  LoadedTile load_tile(int64_t head, int64_t first_key, const TileRows& tile, const TileRows& next) const;
  void unpack(bool exact, LoadedTile* tile);
  // `seeing` rows see something of the tile, `whole` ones among them all of it.
  void attend_tile(LoadedTile& tile, RowRange seeing, RowRange whole);
  void attend_all_tokens(const LoadedTile& tile, RowRange rows);
  void attend_visible_tokens(const LoadedTile& tile, RowRange rows);
  // A block of rows against the first tokens of a tile, of which each row sees `visible`; null: all.
  void attend_rows(const LoadedTile& tile, int row, int count, int num_tokens, const TokenRange* visible);
  void softmax(const LoadedTile& tile, int row, int count, int num_tokens, const TokenRange* visible, float* rescale);
  void accumulate(const LoadedTile& tile, const AccumulateJob& job, const TokenRange* visible) const;
  float max_with_offset(const PartialResult& result, int64_t row) const;
  void finish_row(const PartialResult& result, int64_t row) const;
  template <class T>
  T* scratch(int64_t offset) const {
    return reinterpret_cast<T*>(scratch_ + offset);
  }

  const AttentionCall& call_;
  const AttentionBatch& batch_;
  const WorkItem item_;
  const int group_, rows_per_head_;
  char* scratch_;
  TileReader reader_;
  PartialResult result_{};
};

}  // namespace quantattn::cpu
