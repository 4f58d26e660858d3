#include "cpu/decode.h"

#include <algorithm>
#include <atomic>
#include <new>

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

void run_item(const DecodeRun& run, int64_t item, int worker) {
  const DecodeSchedule& schedule = run.call.schedule;
  const SequencePosition* end = run.positions + run.call.params.batch_size;
  const SequencePosition* sequence =
      std::upper_bound(run.positions, end, item, [](int64_t i, const SequencePosition& s) { return i < s.first_item; }) - 1;
  const int64_t b = sequence - run.positions, num_parts = sequence->num_parts;
  const int64_t block = (item - sequence->first_item) / num_parts, part = (item - sequence->first_item) % num_parts;
  ItemRunner runner(run.call, b, block, run.workers + worker * run.call.layout.bytes);
  const int64_t first_partial = sequence->first_partial + block * num_parts;
  const PartialResult result = num_parts == 1 ? runner.own_result() : run.partial(first_partial + part);
  runner.attend(schedule.part(b, part, num_parts), result);
  if (num_parts == 1) return runner.finish(result);

  // Whoever comes last joins the parts, in their order: the sum's rounding depends on nothing else.
  std::atomic_ref<int32_t> arrivals(run.arrivals[b * schedule.num_blocks() + block]);
  if (arrivals.fetch_add(1, std::memory_order_acq_rel) + 1 < num_parts) return;
  const PartialResult joined = run.partial(first_partial);
  run.call.isa.stages->edge.join({joined, num_parts, schedule.partial_floats(), runner.num_rows(), run.call.padded_head_dim()});
  runner.finish(joined);
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
  for (int worker = 0; worker < num_threads; ++worker)
    new (run.workers + worker * run.call.layout.bytes + run.call.layout.loaded) LoadedQueries;
  parallel_for(num_threads, num_items, [&run](int64_t item, int worker) { run_item(run, item, worker); });
}

}  // namespace quantattn::cpu
