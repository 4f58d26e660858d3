#include "cpu/decode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "cpu/item_runner.h"
#include "cpu/thread_pool.h"

namespace quantattn::cpu {
namespace {

struct DecodeRun {
  DecodeCall call;
  const SequencePosition* positions;
  int32_t* arrivals;
  float* partials;
  char* workers;

  PartialResult partial(int64_t index) const {
    const int64_t rows = int64_t{call.schedule.rows_per_head()} * call.schedule.heads_per_block();
    float* start = partials + index * call.schedule.partial_floats();
    return {start, start + rows * call.padded_head_dim(), start + rows * (call.padded_head_dim() + 1)};
  }
};

// Adds parts in their order, whoever comes last to do it: the sum's rounding depends on nothing else.
void merge_parts(const DecodeRun& run, int64_t first_partial, int64_t num_parts, int64_t num_rows) {
  const PartialResult total = run.partial(first_partial);
  const int64_t width = run.call.padded_head_dim();
  for (int64_t part = 1; part < num_parts; ++part) {
    const PartialResult added = run.partial(first_partial + part);
    for (int64_t row = 0; row < num_rows; ++row) {
      const float max = std::max(total.max[row], added.max[row]);
      if (max == -std::numeric_limits<float>::infinity()) continue;
      const float keep = std::exp(total.max[row] - max), take = std::exp(added.max[row] - max);
      float* out = total.out + row * width;
      const float* from = added.out + row * width;
      for (int64_t i = 0; i < width; ++i) out[i] = out[i] * keep + from[i] * take;
      total.sum[row] = total.sum[row] * keep + added.sum[row] * take;
      total.max[row] = max;
    }
  }
}

void run_item(const DecodeRun& run, int64_t item, int worker) {
  const DecodeSchedule& schedule = run.call.schedule;
  const SequencePosition* end = run.positions + run.call.params.batch_size;
  const SequencePosition* sequence =
      std::upper_bound(run.positions, end, item, [](int64_t i, const SequencePosition& s) { return i < s.first_item; }) - 1;
  const int64_t b = sequence - run.positions, num_parts = sequence->num_parts;
  const int64_t block = (item - sequence->first_item) / num_parts, part = (item - sequence->first_item) % num_parts;
  ItemRunner runner(run.call, b, block, run.workers + worker * run.call.layout.bytes);
  const PartialResult result = runner.attend(schedule.part(b, part, num_parts));
  if (num_parts == 1) return runner.finish(result);

  const int64_t first_partial = sequence->first_partial + block * num_parts, num_rows = runner.num_rows();
  const PartialResult kept = run.partial(first_partial + part);
  std::copy(result.out, result.out + num_rows * run.call.padded_head_dim(), kept.out);
  std::copy(result.max, result.max + num_rows, kept.max);
  std::copy(result.sum, result.sum + num_rows, kept.sum);
  std::atomic_ref<int32_t> arrivals(run.arrivals[b * schedule.num_blocks() + block]);
  if (arrivals.fetch_add(1, std::memory_order_acq_rel) + 1 < num_parts) return;
  merge_parts(run, first_partial, num_parts, num_rows);
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
    num_items += num_parts * schedule.num_blocks();
    if (num_parts > 1) num_partials += num_parts * schedule.num_blocks();
  }
  if (num_partials > 0) std::fill(arrivals, arrivals + params.batch_size * schedule.num_blocks(), 0);

  const DecodeRun run{{params, schedule, isa, worker_layout(isa, schedule, params.cache.head_dim)},
                      positions,
                      arrivals,
                      reinterpret_cast<float*>(scratch + layout.partials),
                      scratch + layout.workers};
  // The plan counted the threads; the machine's answer may have changed since.
  const int num_threads = static_cast<int>((plan.workspace_bytes - layout.workers) / run.call.layout.bytes);
  parallel_for(num_threads, num_items, [&run](int64_t item, int worker) { run_item(run, item, worker); });
}

}  // namespace quantattn::cpu
