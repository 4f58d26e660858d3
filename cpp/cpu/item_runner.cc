#include "cpu/item_runner.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace quantattn::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

ItemRunner::ItemRunner(const DecodeCall& call, int64_t b, int64_t block, char* scratch)
    : call_(call),
      params_(call.params),
      b_(b),
      block_(block),
      first_head_(block * call.schedule.heads_per_block()),
      num_heads_(call.schedule.num_heads_in(block)),
      rows_per_head_(call.schedule.rows_per_head()),
      scratch_(scratch),
      reader_(call.params, b, first_head_) {}

PartialResult ItemRunner::own_result() const {
  return {scratch<float>(call_.layout.out), scratch<float>(call_.layout.max), scratch<float>(call_.layout.sum)};
}

void ItemRunner::load_queries() {
  if (loaded().b == b_ && loaded().block == block_) return;
  loaded() = {b_, block_};
  const int group = call_.group(), head_dim = params_.cache.head_dim;
  float* queries = scratch<float>(call_.layout.queries);
  for (int64_t row = 0; row < num_rows(); ++row) {
    const int64_t head = first_head_ + row / rows_per_head_, token = row % rows_per_head_ / group;
    const int64_t offset = params_.q.offset(b_, token, head * group + row % group);
    const char* from = static_cast<const char*>(params_.q.data) + offset * bytes_of(params_.q_dtype);
    call_.isa.stages->edge.load(from, params_.q_dtype, head_dim, params_.sm_scale, queries + row * head_dim);
  }
}

void ItemRunner::attend(KeyRange keys, const PartialResult& result) {
  result_ = result;
  const int group = call_.group(), num_q_tokens = params_.num_q_tokens;
  std::fill(result_.out, result_.out + num_rows() * call_.padded_head_dim(), 0.f);
  std::fill(result_.max, result_.max + num_rows(), -kInfinity);
  std::fill(result_.sum, result_.sum + num_rows(), 0.f);
  if (keys.end <= keys.first) return;
  load_queries();
  // Keys that every query token sees are read once for all rows. The few before and after are read by each query token that
  // sees them, so that no kernel needs a mask and no key, however poisoned, touches a row that must not see it.
  const DecodeSchedule& schedule = call_.schedule;
  const int64_t common_first = schedule.visible_to(b_, num_q_tokens - 1).first;
  const int64_t common_end = std::max(common_first, schedule.visible_to(b_, 0).end);
  for (int i = 0; i < num_q_tokens; ++i) {
    const KeyRange seen = schedule.visible_to(b_, i);
    attend_keys(i * group, group, std::max(keys.first, seen.first), std::min({keys.end, seen.end, common_first}));
  }
  attend_keys(0, rows_per_head_, std::max(keys.first, common_first), std::min(keys.end, common_end));
  for (int i = 0; i < num_q_tokens; ++i) {
    const KeyRange seen = schedule.visible_to(b_, i);
    attend_keys(i * group, group, std::max({keys.first, seen.first, common_end}), std::min(keys.end, seen.end));
  }
}

void ItemRunner::attend_keys(int first_row, int num_rows, int64_t first_key, int64_t end_key) {
  if (end_key <= first_key) return;
  const auto read = [&](int64_t key, TileRows* tile) {
    reader_.read(key, static_cast<int>(std::min<int64_t>(kTileTokens, end_key - key)), tile);
  };
  TileRows tiles[2];
  read(first_key, &tiles[0]);
  int current = 0;
  for (int64_t key = first_key; key < end_key; key += kTileTokens, current = 1 - current) {
    const bool is_last = key + kTileTokens >= end_key;
    if (!is_last) read(key + kTileTokens, &tiles[1 - current]);
    for (int64_t head = 0; head < num_heads_; ++head)
      attend_tile(head, first_row, num_rows, key, tiles[current], tiles[is_last ? current : 1 - current]);
  }
}

float ItemRunner::coarsest_unit(int64_t head, ScaleRange scales) {
  float* units = scratch<float>(call_.layout.units);
  if (!loaded().has_units) {
    loaded().has_units = true;
    const int64_t head_elements = int64_t{rows_per_head_} * params_.cache.head_dim;
    for (int64_t h = 0; h < num_heads_; ++h)
      units[h] = call_.isa.stages->edge.coarsest_unit(scratch<float>(call_.layout.queries) + h * head_elements, rows_per_head_,
                                                      params_.cache.head_dim);
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
        scratch<float>(call_.layout.queries), static_cast<int>(num_rows()), params_.cache.head_dim, keys.limit, packed);
  }
  return packed;
}

void ItemRunner::attend_tile(int64_t head, int first_row, int num_rows, int64_t first_key, const TileRows& tile,
                             const TileRows& next) {
  const int head_dim = params_.cache.head_dim, num_tokens = tile.num_tokens;
  const IsaStages& stages = *call_.isa.stages;
  const FormatStages& key_format = *call_.isa.formats[static_cast<int>(params_.cache.format.k)];
  const FormatStages& value_format = *call_.isa.formats[static_cast<int>(params_.cache.format.v)];
  // The next head of the tile is next in memory, or the next tile's first.
  const bool is_last_head = head + 1 == num_heads_;
  const TileRows& following = is_last_head ? next : tile;
  const int64_t following_head = is_last_head ? 0 : head + 1;
  const CodeTile key_codes = reader_.keys(tile, head, following, following_head);
  const CodeTile value_codes = reader_.values(tile, head, following, following_head);
  alignas(64) float key_scales[kTileTokens], value_scales[kTileTokens];
  reader_.load_scales(stages.edge, tile, head, key_scales, value_scales);

  Operand keys{scratch_ + call_.layout.keys, key_format.direct_arithmetic};
  Operand values{scratch_ + call_.layout.values, Arithmetic::kFloat32};
  const bool keys_are_direct = num_rows <= key_format.max_direct_rows;
  const bool values_are_direct = num_rows <= value_format.max_direct_rows;
  if (!keys_are_direct) {
    const float unit = key_format.rounds_keys ? coarsest_unit(head, stages.edge.range_of(key_scales)) : 0.f;
    key_format.unpack_keys(key_codes, head_dim, unit, &keys);
  }
  if (!values_are_direct) value_format.unpack_values(value_codes, head_dim, &values);

  const bool has_negative_scale = stages.edge.range_of(value_scales).smallest < 0.f;
  const ArithmeticStages& key_product = stages.arithmetics[static_cast<int>(keys.arithmetic)];
  const ArithmeticStages& value_product = stages.arithmetics[static_cast<int>(values.arithmetic)];
  const int64_t query_row_bytes = key_product.query_row_bytes(head_dim);
  const char* queries = packed_queries(keys) + head * rows_per_head_ * query_row_bytes;
  float* scores = scratch<float>(call_.layout.scores);
  float rescale[kRowBlock];
  for (int row = first_row; row < first_row + num_rows; row += kRowBlock) {
    const int count = std::min(kRowBlock, first_row + num_rows - row);
    const ScoreJob score{queries + row * query_row_bytes, &keys, key_scales, scores, count, num_tokens, head_dim};
    keys_are_direct ? key_format.score_direct(key_codes, score) : key_product.score(score);
    softmax(head, row, count, first_key, num_tokens, value_scales, rescale);
    float* out = result_.out + (head * rows_per_head_ + row) * call_.padded_head_dim();
    const AccumulateJob accumulate{
        scores, &values, rescale, out, count, num_tokens, head_dim, call_.padded_head_dim(), has_negative_scale};
    values_are_direct ? value_format.accumulate_direct(value_codes, accumulate) : value_product.accumulate(accumulate);
  }
}

void ItemRunner::softmax(int64_t head, int row, int count, int64_t first_key, int num_tokens, const float* value_scales,
                         float* rescale) {
  const int group = call_.group();
  float slopes[kRowBlock], distances[kRowBlock];
  for (int r = 0; params_.alibi_slopes && r < count; ++r) {
    const int64_t position = int64_t{params_.seq_lens[b_]} - params_.num_q_tokens + (row + r) / group;
    slopes[r] = params_.alibi_slopes.at(b_, (first_head_ + head) * group + (row + r) % group);
    distances[r] = static_cast<float>(first_key - position);
  }
  const int64_t first = head * rows_per_head_ + row;
  call_.isa.stages->edge.softmax({scratch<float>(call_.layout.scores), value_scales, result_.max + first, result_.sum + first,
                                  rescale, params_.alibi_slopes ? slopes : nullptr, distances, params_.logits_soft_cap, count,
                                  num_tokens});
}

void ItemRunner::finish(const PartialResult& result) const {
  for (int64_t row = 0; row < num_rows(); ++row) finish_row(result, row);
}

void ItemRunner::finish_row(const PartialResult& result, int64_t row) const {
  const int group = call_.group();
  const int64_t token = row % rows_per_head_ / group, head = (first_head_ + row / rows_per_head_) * group + row % group;
  const float sink = params_.sinks ? params_.sinks[head] : -kInfinity;
  const float max = std::max(result.max[row], sink);
  float weight = 0.f, lse = -kInfinity;
  // A score that is NaN leaves the maximum alone and shows in the sum; the result must not pass for one without keys.
  if (max != -kInfinity || std::isnan(result.sum[row])) {
    const float shrink = std::exp(result.max[row] - max);
    const float sum = result.sum[row] * shrink + std::exp(sink - max);
    weight = shrink / sum;
    lse = max + std::log(sum);
  }
  char* out = static_cast<char*>(params_.out.data) + params_.out.offset(b_, token, head) * bytes_of(params_.q_dtype);
  const float* from = result.out + row * call_.padded_head_dim();
  call_.isa.stages->edge.store(from, weight, params_.cache.head_dim, params_.q_dtype, out);
  if (params_.lse) params_.lse[(b_ * params_.num_q_tokens + token) * params_.num_q_heads + head] = lse;
}

}  // namespace quantattn::cpu
