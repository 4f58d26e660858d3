#include "cpu/decode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "cpu/decode_plan.h"
#include "cpu/thread_pool.h"
#include "cpu/tile_reader.h"

namespace quantattn::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Result of some keys for the rows of one (sequence, KV head): not yet divided by the sum. Row r is query token r / group,
// query head r % group of the KV head.
struct PartialResult {
  float* out;  // [rows, padded head_dim]
  float* max;  // [rows]
  float* sum;  // [rows]
};

struct DecodeRun {
  const DecodeParams& params;
  const DecodeSchedule& schedule;
  const Isa& isa;
  WorkerLayout worker;
  const SequencePosition* positions;
  int32_t* arrivals;
  float* partials;
  char* workers;

  int group() const { return params.num_q_heads / params.cache.num_kv_heads; }
  int padded() const { return round_up(params.cache.head_dim, kLanePadding); }
  PartialResult partial(int64_t index) const {
    float* start = partials + index * schedule.partial_floats();
    return {start, start + int64_t{schedule.rows()} * padded(), start + int64_t{schedule.rows()} * (padded() + 1)};
  }
};

// One work item on one thread.
class ItemRunner {
 public:
  ItemRunner(const DecodeRun& run, int64_t b, int64_t kv_head, int worker);
  PartialResult attend(KeyRange keys);
  // Divides by the sums, adds the sinks and writes out and lse.
  void finish(const PartialResult& result) const;

 private:
  void load_queries();
  // Query rows [first_row, first_row + num_rows) against keys that each of them sees.
  void attend_rows(int first_row, int num_rows, int64_t first_key, int64_t end_key);
  // Queries packed for the arithmetic of `keys`.
  const char* packed_queries(const Operand& keys);
  void attend_tile(int first_row, int num_rows, int64_t first_key, const Tile& tile);
  template <class T>
  T* scratch(int64_t offset) const {
    return reinterpret_cast<T*>(scratch_ + offset);
  }

  const DecodeRun& run_;
  const DecodeParams& params_;
  int64_t b_, kv_head_;
  char* scratch_;
  TileReader reader_;
  PartialResult result_;
  Arithmetic packed_for_ = Arithmetic::kFloat32;
  int packed_limit_ = -1;  // of the keys that the packed queries are for; -1: nothing is packed
};

ItemRunner::ItemRunner(const DecodeRun& run, int64_t b, int64_t kv_head, int worker)
    : run_(run),
      params_(run.params),
      b_(b),
      kv_head_(kv_head),
      scratch_(run.workers + worker * run.worker.bytes),
      reader_(run.params, run.isa.stages->edge, b, kv_head),
      result_{scratch<float>(run.worker.out), scratch<float>(run.worker.max), scratch<float>(run.worker.sum)} {}

void ItemRunner::load_queries() {
  const int group = run_.group(), head_dim = params_.cache.head_dim;
  float* queries = scratch<float>(run_.worker.queries);
  for (int row = 0; row < run_.schedule.rows(); ++row) {
    const int64_t offset = params_.q.offset(b_, row / group, kv_head_ * group + row % group);
    const char* from = static_cast<const char*>(params_.q.data) + offset * bytes_of(params_.q_dtype);
    run_.isa.stages->edge.load(from, params_.q_dtype, head_dim, params_.sm_scale, queries + int64_t{row} * head_dim);
  }
}

PartialResult ItemRunner::attend(KeyRange keys) {
  const int num_rows = run_.schedule.rows(), group = run_.group(), num_q_tokens = params_.num_q_tokens;
  std::fill(result_.out, result_.out + int64_t{num_rows} * run_.padded(), 0.f);
  std::fill(result_.max, result_.max + num_rows, -kInfinity);
  std::fill(result_.sum, result_.sum + num_rows, 0.f);
  if (keys.end <= keys.first) return result_;
  load_queries();
  // Keys that every query token sees are read once for all rows. The few before and after are read by each query token that
  // sees them, so that no kernel needs a mask and no key, however poisoned, touches a row that must not see it.
  const int64_t common_first = run_.schedule.visible_to(b_, num_q_tokens - 1).first;
  const int64_t common_end = std::max(common_first, run_.schedule.visible_to(b_, 0).end);
  for (int i = 0; i < num_q_tokens; ++i) {
    const KeyRange seen = run_.schedule.visible_to(b_, i);
    attend_rows(i * group, group, std::max(keys.first, seen.first), std::min({keys.end, seen.end, common_first}));
  }
  attend_rows(0, num_rows, std::max(keys.first, common_first), std::min(keys.end, common_end));
  for (int i = 0; i < num_q_tokens; ++i) {
    const KeyRange seen = run_.schedule.visible_to(b_, i);
    attend_rows(i * group, group, std::max({keys.first, seen.first, common_end}), std::min(keys.end, seen.end));
  }
  return result_;
}

void ItemRunner::attend_rows(int first_row, int num_rows, int64_t first_key, int64_t end_key) {
  if (end_key <= first_key) return;
  const auto read = [&](int64_t key, Tile* tile) {
    reader_.read(key, static_cast<int>(std::min<int64_t>(kTileTokens, end_key - key)), tile);
  };
  Tile tiles[2];
  read(first_key, &tiles[0]);
  for (int64_t key = first_key, index = 0; key < end_key; key += kTileTokens, ++index) {
    Tile &tile = tiles[index % 2], &next = tiles[(index + 1) % 2];
    const bool is_last = key + kTileTokens >= end_key;
    if (!is_last) read(key + kTileTokens, &next);
    tile.keys.next = is_last ? nullptr : &next.keys;
    tile.values.next = is_last ? nullptr : &next.values;
    attend_tile(first_row, num_rows, key, tile);
  }
}

const char* ItemRunner::packed_queries(const Operand& keys) {
  char* packed = scratch_ + run_.worker.packed_queries;
  if (packed_limit_ != keys.limit || packed_for_ != keys.arithmetic) {
    packed_for_ = keys.arithmetic;
    packed_limit_ = keys.limit;
    run_.isa.stages->arithmetics[static_cast<int>(keys.arithmetic)].pack_queries(
        scratch<float>(run_.worker.queries), run_.schedule.rows(), params_.cache.head_dim, keys.limit, packed);
  }
  return packed;
}

void ItemRunner::attend_tile(int first_row, int num_rows, int64_t first_key, const Tile& tile) {
  const int head_dim = params_.cache.head_dim, group = run_.group(), num_tokens = tile.keys.num_tokens;
  const IsaStages& stages = *run_.isa.stages;
  Operand keys, values;
  keys.data = scratch_ + run_.worker.keys;
  values.data = scratch_ + run_.worker.values;
  run_.isa.formats[static_cast<int>(params_.cache.format.k)]->unpack_keys(tile.keys, head_dim, &keys);
  run_.isa.formats[static_cast<int>(params_.cache.format.v)]->unpack_values(tile.values, head_dim, &values);
  const ArithmeticStages& key_product = stages.arithmetics[static_cast<int>(keys.arithmetic)];
  const ArithmeticStages& value_product = stages.arithmetics[static_cast<int>(values.arithmetic)];
  const char* queries = packed_queries(keys);
  const int64_t query_row_bytes = key_product.query_row_bytes(head_dim);
  float* scores = scratch<float>(run_.worker.scores);
  float rescale[kRowBlock], slopes[kRowBlock], distances[kRowBlock];
  for (int row = first_row; row < first_row + num_rows; row += kRowBlock) {
    const int count = std::min(kRowBlock, first_row + num_rows - row);
    key_product.score({queries + row * query_row_bytes, &keys, tile.key_scales, scores, count, num_tokens, head_dim});
    for (int r = 0; params_.alibi_slopes && r < count; ++r) {
      const int64_t position = int64_t{params_.seq_lens[b_]} - params_.num_q_tokens + (row + r) / group;
      slopes[r] = params_.alibi_slopes.at(b_, kv_head_ * group + (row + r) % group);
      distances[r] = static_cast<float>(first_key - position);
    }
    stages.edge.softmax({scores, tile.value_scales, result_.max + row, result_.sum + row, rescale,
                         params_.alibi_slopes ? slopes : nullptr, distances, params_.logits_soft_cap, count, num_tokens});
    value_product.accumulate(
        {scores, &values, rescale, result_.out + int64_t{row} * run_.padded(), count, num_tokens, head_dim, run_.padded()});
  }
}

void ItemRunner::finish(const PartialResult& result) const {
  const int group = run_.group(), head_dim = params_.cache.head_dim;
  for (int row = 0; row < run_.schedule.rows(); ++row) {
    const int64_t token = row / group, head = kv_head_ * group + row % group;
    const float sink = params_.sinks ? params_.sinks[head] : -kInfinity;
    const float max = std::max(result.max[row], sink);
    float weight = 0.f, lse = -kInfinity;
    if (max != -kInfinity) {
      const float shrink = std::exp(result.max[row] - max);
      const float sum = result.sum[row] * shrink + std::exp(sink - max);
      weight = shrink / sum;
      lse = max + std::log(sum);
    }
    char* out = static_cast<char*>(params_.out.data) + params_.out.offset(b_, token, head) * bytes_of(params_.q_dtype);
    run_.isa.stages->edge.store(result.out + int64_t{row} * run_.padded(), weight, head_dim, params_.q_dtype, out);
    if (params_.lse) params_.lse[(b_ * params_.num_q_tokens + token) * params_.num_q_heads + head] = lse;
  }
}

// Adds parts in their order, whoever comes last to do it: the sum's rounding depends on nothing else.
void merge_parts(const DecodeRun& run, int64_t first_partial, int64_t num_parts) {
  const PartialResult total = run.partial(first_partial);
  for (int row = 0; row < run.schedule.rows(); ++row)
    for (int64_t part = 1; part < num_parts; ++part) {
      const PartialResult added = run.partial(first_partial + part);
      const float max = std::max(total.max[row], added.max[row]);
      if (max == -kInfinity) continue;
      const float keep = std::exp(total.max[row] - max), take = std::exp(added.max[row] - max);
      float* out = total.out + int64_t{row} * run.padded();
      const float* from = added.out + int64_t{row} * run.padded();
      for (int i = 0; i < run.padded(); ++i) out[i] = out[i] * keep + from[i] * take;
      total.sum[row] = total.sum[row] * keep + added.sum[row] * take;
      total.max[row] = max;
    }
}

void run_item(const DecodeRun& run, int64_t item, int worker) {
  const SequencePosition* end = run.positions + run.params.batch_size;
  const SequencePosition* sequence =
      std::upper_bound(run.positions, end, item, [](int64_t i, const SequencePosition& s) { return i < s.first_item; }) - 1;
  const int64_t b = sequence - run.positions, num_parts = sequence->num_parts;
  const int64_t kv_head = (item - sequence->first_item) / num_parts, part = (item - sequence->first_item) % num_parts;
  ItemRunner runner(run, b, kv_head, worker);
  const PartialResult result = runner.attend(run.schedule.part(b, part, num_parts));
  if (num_parts == 1) return runner.finish(result);

  const int64_t first_partial = sequence->first_partial + kv_head * num_parts;
  const PartialResult kept = run.partial(first_partial + part);
  std::copy(result.out, result.out + int64_t{run.schedule.rows()} * run.padded(), kept.out);
  std::copy(result.max, result.max + run.schedule.rows(), kept.max);
  std::copy(result.sum, result.sum + run.schedule.rows(), kept.sum);
  std::atomic_ref<int32_t> arrivals(run.arrivals[b * run.params.cache.num_kv_heads + kv_head]);
  if (arrivals.fetch_add(1, std::memory_order_acq_rel) + 1 < num_parts) return;
  merge_parts(run, first_partial, num_parts);
  runner.finish(run.partial(first_partial));
}

}  // namespace

void run_decode(const DecodeParams& params, const Execution&, const DecodePlan& plan, Workspace workspace) {
  const Isa& isa = isa_named(plan.variant);
  const DecodeSchedule schedule(params, params.num_splits, plan.split_size);
  const RunLayout layout = run_layout(params, schedule);
  char* scratch = static_cast<char*>(workspace.scratch);
  auto* positions = reinterpret_cast<SequencePosition*>(scratch + layout.positions);
  auto* arrivals = reinterpret_cast<int32_t*>(scratch + layout.arrivals);
  int64_t num_items = 0, num_partials = 0;
  for (int64_t b = 0; b < params.batch_size; ++b) {
    const int64_t num_parts = schedule.num_parts(b);
    positions[b] = {num_items, num_partials, num_parts};
    num_items += num_parts * params.cache.num_kv_heads;
    if (num_parts > 1) num_partials += num_parts * params.cache.num_kv_heads;
  }
  if (num_partials > 0) std::fill(arrivals, arrivals + int64_t{params.batch_size} * params.cache.num_kv_heads, 0);

  const DecodeRun run{params,
                      schedule,
                      isa,
                      worker_layout(isa, schedule.rows(), params.cache.head_dim),
                      positions,
                      arrivals,
                      reinterpret_cast<float*>(scratch + layout.partials),
                      scratch + layout.workers};
  // The plan counted the threads; the machine's answer may have changed since.
  const int num_threads = static_cast<int>((plan.workspace_bytes - layout.workers) / run.worker.bytes);
  parallel_for(num_threads, num_items, [&run](int64_t item, int worker) { run_item(run, item, worker); });
}

}  // namespace quantattn::cpu
