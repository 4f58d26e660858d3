#include "cpu/item_runner.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace quantattn::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Rows of a block whose rows see different keys: few, because all are multiplied by every key that one of them sees.
constexpr int kBandRows = 12;

}  // namespace

ItemRunner::ItemRunner(const AttentionCall& call, const WorkItem& item, char* scratch)
    : call_(call),
      batch_(call.batch),
      item_(item),
      group_(call.batch.group()),
      rows_per_head_(item.num_tokens * call.batch.group()),
      scratch_(scratch),
      reader_(call.batch, item.b, item.sequence.first_key, item.first_head) {}

PartialResult ItemRunner::own_result() const {
  return {scratch<float>(call_.layout.out), scratch<float>(call_.layout.max), scratch<float>(call_.layout.sum)};
}

void ItemRunner::load_queries() {
  if (loaded().b == item_.b && loaded().first_token == item_.first_token && loaded().first_head == item_.first_head) return;
  loaded() = {item_.b, item_.first_token, item_.first_head};
  const int head_dim = batch_.cache.head_dim;
  float* queries = scratch<float>(call_.layout.queries);
  for (int64_t row = 0; row < num_rows(); ++row) {
    const int64_t head = item_.first_head + row / rows_per_head_;
    const int64_t token = item_.sequence.q_token + item_.first_token + row % rows_per_head_ / group_;
    const int64_t offset = batch_.q.offset(item_.sequence.q_outer, token, head * group_ + row % group_);
    const char* from = static_cast<const char*>(batch_.q.data) + offset * bytes_of(batch_.q_dtype);
    call_.isa.stages->edge.load(from, batch_.q_dtype, head_dim, queries + row * head_dim);
  }
  if (batch_.has_score_offsets()) load_score_offsets();
}

void ItemRunner::load_score_offsets() const {
  const int head_dim = batch_.cache.head_dim;
  for (int64_t row = 0; row < num_rows(); ++row) {
    const float* query = scratch<float>(call_.layout.queries) + row * head_dim;
    const float* key_offset = &batch_.cache.k_offset.at(item_.first_head + row / rows_per_head_, 0);
    scratch<float>(call_.layout.score_offsets)[row] =
        batch_.sm_scale * call_.isa.stages->edge.dot_product(query, key_offset, head_dim);
  }
}

void ItemRunner::attend(const PartialResult& result) {
  result_ = result;
  clear_result();
  if (item_.keys.end <= item_.keys.first) return;
  load_queries();
  item_.has_many_tokens ? attend_many_tokens() : attend_few_tokens();
}

void ItemRunner::clear_result() const {
  std::fill(result_.out, result_.out + num_rows() * call_.padded_head_dim(), 0.f);
  std::fill(result_.max, result_.max + num_rows(), -kInfinity);
  std::fill(result_.sum, result_.sum + num_rows(), 0.f);
}

// Most keys are seen by every query token; there the format chooses how to multiply. Around them are those that only some see.
void ItemRunner::attend_few_tokens() {
  const KeyRange keys = item_.keys;
  const int64_t common_first = visible_to(item_.num_tokens - 1).first;
  const int64_t common_end = std::max(common_first, visible_to(0).end);
  attend_visible({keys.first, std::min(keys.end, common_first)});
  attend_common({std::max(keys.first, common_first), std::min(keys.end, common_end)});
  attend_visible({std::max(keys.first, common_end), keys.end});
}

void ItemRunner::attend_many_tokens() {
  attend_visible({item_.keys.first, std::min(item_.keys.first + kMaxSplit, item_.keys.end)});
  const PartialResult joined = result_;
  const int64_t part_stride = call_.layout.part_floats;
  for (int64_t first = item_.keys.first + kMaxSplit; first < item_.keys.end; first += kMaxSplit) {
    result_ = {joined.out + part_stride, joined.max + part_stride, joined.sum + part_stride};
    clear_result();
    attend_visible({first, std::min(first + kMaxSplit, item_.keys.end)});
    call_.isa.stages->edge.join({joined, 2, part_stride, num_rows(), call_.padded_head_dim()});
  }
}

template <class Attend>
void ItemRunner::for_each_tile(KeyRange keys, const Attend& attend) {
  if (keys.end <= keys.first) return;
  const auto read = [&](int64_t key, TileRows* tile) {
    reader_.read(key, static_cast<int>(std::min<int64_t>(kTileTokens, keys.end - key)), tile);
  };
  TileRows tiles[2];
  read(keys.first, &tiles[0]);
  int current = 0;
  for (int64_t key = keys.first; key < keys.end; key += kTileTokens, current = 1 - current) {
    const bool is_last = key + kTileTokens >= keys.end;
    if (!is_last) read(key + kTileTokens, &tiles[1 - current]);
    attend(key, tiles[current], tiles[is_last ? current : 1 - current]);
  }
}

void ItemRunner::attend_common(KeyRange keys) {
  for_each_tile(keys, [&](int64_t first_key, const TileRows& rows_of_tile, const TileRows& next) {
    for (int64_t head = 0; head < item_.num_heads; ++head) {
      LoadedTile tile = load_tile(head, first_key, rows_of_tile, next);
      tile.keys_are_direct = rows_per_head_ <= key_stages().max_direct_rows;
      tile.values_are_direct = rows_per_head_ <= value_stages().max_direct_rows;
      unpack(false, &tile);
      attend_all_tokens(tile, {0, rows_per_head_});
    }
  });
}

template <class Holds>
int ItemRunner::first_row_where(const Holds& holds) const {
  int first = 0, end = item_.num_tokens;
  while (first < end) {
    const int middle = first + (end - first) / 2;
    holds(visible_to(middle)) ? end = middle : first = middle + 1;
  }
  return first * group_;
}

void ItemRunner::attend_visible(KeyRange keys) {
  for_each_tile(keys, [&](int64_t first_key, const TileRows& rows_of_tile, const TileRows& next) {
    const int64_t end_key = first_key + rows_of_tile.num_tokens;
    const RowRange seeing = {first_row_where([=](KeyRange seen) { return seen.end > first_key; }),
                             first_row_where([=](KeyRange seen) { return seen.first >= end_key; })};
    const int first_whole = first_row_where([=](KeyRange seen) { return seen.end >= end_key; });
    const int end_whole = first_row_where([=](KeyRange seen) { return seen.first > first_key; });
    if (seeing.end <= seeing.first) return;
    // Without rows that see the whole tile, `whole` is empty and lies at the end of `seeing`.
    const RowRange whole = first_whole < end_whole ? RowRange{first_whole, end_whole} : RowRange{seeing.end, seeing.end};
    for (int64_t head = 0; head < item_.num_heads; ++head) {
      LoadedTile tile = load_tile(head, first_key, rows_of_tile, next);
      attend_tile(tile, seeing, whole);
    }
  });
}

void ItemRunner::attend_tile(LoadedTile& tile, RowRange seeing, RowRange whole) {
  const bool has_whole = whole.end > whole.first, has_partial = whole.first > seeing.first || whole.end < seeing.end;
  if (has_whole) {
    unpack(false, &tile);
    attend_all_tokens(tile, whole);
  }
  if (!has_partial) return;
  // Rounding would let a row's result depend on keys that it does not see.
  if (!has_whole || key_stages().rounds || value_stages().rounds) unpack(true, &tile);
  attend_visible_tokens(tile, {seeing.first, whole.first});
  attend_visible_tokens(tile, {whole.end, seeing.end});
}

float ItemRunner::coarsest_unit(int64_t head, ScaleRange scales) {
  float* units = scratch<float>(call_.layout.units);
  const int head_dim = batch_.cache.head_dim;
  if (!loaded().has_units) {
    loaded().has_units = true;
    const int64_t head_elements = int64_t{rows_per_head_} * head_dim;
    for (int64_t h = 0; h < item_.num_heads; ++h)
      units[h] = call_.isa.stages->edge.coarsest_unit(scratch<float>(call_.layout.queries) + h * head_elements, rows_per_head_,
                                                      head_dim);
  }
  return units[head] / std::max(scales.largest, -scales.smallest);
}

const char* ItemRunner::packed_queries(const Operand& keys) {
  if (keys.arithmetic == Arithmetic::kFloat32) return scratch<char>(call_.layout.queries);
  char* packed = scratch_ + call_.layout.packed_queries;
  if (loaded().packed_limit != keys.limit || loaded().packed_for != keys.arithmetic) {
    loaded().packed_for = keys.arithmetic;
    loaded().packed_limit = keys.limit;
    call_.isa.stages->arithmetics[static_cast<int>(keys.arithmetic)].pack_queries(
        scratch<float>(call_.layout.queries), static_cast<int>(num_rows()), batch_.cache.head_dim, keys.limit, packed);
  }
  return packed;
}

ItemRunner::LoadedTile ItemRunner::load_tile(int64_t head, int64_t first_key, const TileRows& rows,
                                             const TileRows& next) const {
  // The next head of the tile is next in memory, or the next tile's first.
  const bool is_last_head = head + 1 == item_.num_heads;
  const TileRows& following = is_last_head ? next : rows;
  const int64_t following_head = is_last_head ? 0 : head + 1;
  LoadedTile tile;
  tile.head = head;
  tile.first_key = first_key;
  tile.key_codes = reader_.keys(rows, head, following, following_head);
  tile.value_codes = reader_.values(rows, head, following, following_head);
  tile.keys = {scratch_ + call_.layout.keys, key_stages().direct_arithmetic};
  tile.values = {scratch_ + call_.layout.values, Arithmetic::kFloat32};
  tile.keys_are_direct = tile.values_are_direct = false;
  const EdgeStages& edge = call_.isa.stages->edge;
  reader_.load_scales(edge, rows, head, tile.key_scales, tile.value_scales);
  tile.has_negative_scale = edge.range_of(tile.value_scales).smallest < 0.f;
  return tile;
}

void ItemRunner::unpack(bool exact, LoadedTile* tile) {
  const int head_dim = batch_.cache.head_dim;
  if (!tile->keys_are_direct) {
    const bool may_round = key_stages().rounds && !exact;
    const float unit = may_round ? coarsest_unit(tile->head, call_.isa.stages->edge.range_of(tile->key_scales)) : 0.f;
    key_stages().unpack_keys(tile->key_codes, head_dim, unit, &tile->keys);
  }
  if (!tile->values_are_direct) value_stages().unpack_values(tile->value_codes, head_dim, exact, &tile->values);
}

void ItemRunner::attend_all_tokens(const LoadedTile& tile, RowRange rows) {
  for (int row = rows.first; row < rows.end; row += kRowBlock)
    attend_rows(tile, row, std::min(kRowBlock, rows.end - row), tile.key_codes.num_tokens, nullptr);
}

void ItemRunner::attend_visible_tokens(const LoadedTile& tile, RowRange rows) {
  TokenRange visible[kBandRows];
  for (int row = rows.first; row < rows.end; row += kBandRows) {
    const int count = std::min(kBandRows, rows.end - row);
    for (int r = 0; r < count; ++r) {
      const KeyRange seen = visible_to((row + r) / group_);
      const auto token_of = [&](int64_t key) {
        return static_cast<int>(std::clamp<int64_t>(key - tile.first_key, 0, tile.key_codes.num_tokens));
      };
      visible[r] = {token_of(seen.first), token_of(seen.end)};
    }
    attend_rows(tile, row, count, visible[count - 1].end, visible);
  }
}

void ItemRunner::attend_rows(const LoadedTile& tile, int row, int count, int num_tokens, const TokenRange* visible) {
  const int head_dim = batch_.cache.head_dim, padded = call_.padded_head_dim();
  const ArithmeticStages& key_product = call_.isa.stages->arithmetics[static_cast<int>(tile.keys.arithmetic)];
  const int64_t query_row_bytes = key_product.query_row_bytes(head_dim), head_row = tile.head * rows_per_head_ + row;
  const char* queries = packed_queries(tile.keys) + head_row * query_row_bytes;
  float* scores = scratch<float>(call_.layout.scores);
  float rescale[kRowBlock];
  const ScoreJob score{queries, &tile.keys, tile.key_scales, scores, count, num_tokens, head_dim};
  tile.keys_are_direct ? key_stages().score_direct(tile.key_codes, score) : key_product.score(score);
  softmax(tile, row, count, num_tokens, visible, rescale);
  float* out = result_.out + head_row * padded;
  accumulate(tile, {scores, &tile.values, rescale, out, count, num_tokens, head_dim, padded, tile.has_negative_scale}, visible);
}

void ItemRunner::softmax(const LoadedTile& tile, int row, int count, int num_tokens, const TokenRange* visible,
                         float* rescale) {
  float slopes[kRowBlock], distances[kRowBlock];
  const Sequence& sequence = item_.sequence;
  for (int r = 0; batch_.alibi_slopes && r < count; ++r) {
    const int64_t token = item_.first_token + (row + r) / group_;
    const int64_t position = sequence.length - sequence.num_q_tokens + token;
    slopes[r] = batch_.alibi_slopes.at(item_.b, (item_.first_head + tile.head) * group_ + (row + r) % group_);
    distances[r] = static_cast<float>(tile.first_key - position);
  }
  const int64_t first = tile.head * rows_per_head_ + row;
  const bool has_offsets = batch_.logits_soft_cap > 0.f && batch_.has_score_offsets();
  const float* offsets = has_offsets ? scratch<float>(call_.layout.score_offsets) + first : nullptr;
  call_.isa.stages->edge.softmax({scratch<float>(call_.layout.scores), tile.value_scales, result_.max + first,
                                  result_.sum + first, rescale, offsets, batch_.alibi_slopes ? slopes : nullptr, distances,
                                  visible, batch_.logits_soft_cap, count, num_tokens});
}

void ItemRunner::accumulate(const LoadedTile& tile, const AccumulateJob& job, const TokenRange* visible) const {
  if (tile.values_are_direct) return value_stages().accumulate_direct(tile.value_codes, job);
  const ArithmeticStages& product = call_.isa.stages->arithmetics[static_cast<int>(tile.values.arithmetic)];
  if (!visible || tile.values.is_finite) return product.accumulate(job);
  // A weight of zero does not keep an infinite value or a NaN away: each row is multiplied by the tokens that it sees.
  for (int row = 0; row < job.num_rows; ++row) {
    Operand values = tile.values;
    values.data = static_cast<char*>(values.data) + visible[row].first * values.step_stride;
    AccumulateJob one = job;
    one.weights += row * kTileTokens + visible[row].first;
    one.values = &values;
    one.rescale += row;
    one.out += int64_t{row} * job.row_stride;
    one.num_rows = 1;
    one.num_tokens = std::max(0, visible[row].end - visible[row].first);
    product.accumulate(one);
  }
}

void ItemRunner::finish(const PartialResult& result) {
  if (batch_.has_score_offsets()) load_queries();  // an item without keys has not
  for (int64_t row = 0; row < num_rows(); ++row) finish_row(result, row);
}

// Without a soft cap the offset of a row's scores joins their maximum alone, once, in the end. Maxima of rows that see no key
// stay -inf, even where the query is NaN.
float ItemRunner::max_with_offset(const PartialResult& result, int64_t row) const {
  const float max = result.max[row];
  if (batch_.logits_soft_cap > 0.f || !batch_.has_score_offsets() || max == -kInfinity) return max;
  return max + scratch<float>(call_.layout.score_offsets)[row];
}

void ItemRunner::finish_row(const PartialResult& result, int64_t row) const {
  const int64_t token = item_.first_token + row % rows_per_head_ / group_;
  const int64_t head = (item_.first_head + row / rows_per_head_) * group_ + row % group_;
  const float sink = batch_.sinks ? batch_.sinks[head] : -kInfinity;
  const float max_score = max_with_offset(result, row), max = std::max(max_score, sink);
  float weight = 0.f, lse = -kInfinity;
  // A score that is NaN leaves the maximum alone and shows in the sum; the result must not pass for one without keys.
  if (max != -kInfinity || std::isnan(result.sum[row])) {
    const float shrink = std::exp(max_score - max);
    const float sum = result.sum[row] * shrink + std::exp(sink - max);
    weight = shrink / sum;
    lse = max + std::log(sum);
  }
  const Sequence& sequence = item_.sequence;
  const int64_t offset = batch_.out.offset(sequence.q_outer, sequence.q_token + token, head);
  char* out = static_cast<char*>(batch_.out.data) + offset * bytes_of(batch_.q_dtype);
  const float* from = result.out + row * call_.padded_head_dim();
  call_.isa.stages->edge.store(from, weight, batch_.cache.head_dim, batch_.q_dtype, out);
  if (batch_.lse) batch_.lse[(sequence.lse_token + token) * batch_.num_q_heads + head] = lse;
}

}  // namespace quantattn::cpu
