#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "cpu/isa_table.h"
#include "cpu/item_runner.h"
#include "cpu/thread_pool.h"

namespace quantattn::cpu {
namespace {

struct Run {
  AttentionCall call;
  const SequenceWork* works;
  const SequenceWork* end_of_works;
  int32_t* arrivals;
  float* partials;
  char* workers;

  const SequenceWork& work_with(int64_t item) const {
    const auto starts_after = [](int64_t i, const SequenceWork& work) { return i < work.first_item; };
    return *(std::upper_bound(works, end_of_works, item, starts_after) - 1);
  }
  PartialResult partial(const SequenceWork& work, int64_t index) const {
    const int64_t rows = call.schedule.max_rows(work), padded = call.padded_head_dim();
    float* start = partials + work.first_partial + index * call.schedule.partial_floats(work);
    return {start, start + rows * padded, start + rows * (padded + 1)};
  }
};

void run_item(const Run& run, int64_t index, int worker) {
  const Schedule& schedule = run.call.schedule;
  const SequenceWork& work = run.work_with(index);
  const int64_t local = index - work.first_item, num_parts = work.num_parts;
  ItemRunner runner(run.call, schedule.item(work, local), run.workers + worker * run.call.layout.bytes);
  const PartialResult result = num_parts == 1 ? runner.own_result() : run.partial(work, local);
  runner.attend(result);
  if (num_parts == 1) return runner.finish(result);

  // Whoever comes last joins the parts, in their order: the sum's rounding depends on nothing else.
  const int64_t block = local / num_parts;
  std::atomic_ref<int32_t> arrivals(run.arrivals[work.first_arrival + block]);
  if (arrivals.fetch_add(1, std::memory_order_acq_rel) + 1 < num_parts) return;
  const PartialResult joined = run.partial(work, block * num_parts);
  run.call.isa.stages->edge.join(
      {joined, num_parts, schedule.partial_floats(work), runner.num_rows(), run.call.padded_head_dim()});
  runner.finish(joined);
}

// Lists the sequences that have items, those with many query tokens first: their items take longest.
const SequenceWork* place_works(const AttentionBatch& batch, const Schedule& schedule, int64_t num_long, SequenceWork* works) {
  SequenceWork *next_long = works, *end = works + num_long;
  for (int64_t b = 0; b < batch.batch_size; ++b) {
    const SequenceWork work = schedule.work_of(b);
    if (work.num_items() > 0) *(work.has_many_tokens() ? next_long : end)++ = work;
  }
  int64_t first_item = 0, first_arrival = 0, first_partial = 0;
  for (SequenceWork* work = works; work != end; ++work) {
    work->first_item = first_item;
    work->first_arrival = first_arrival;
    work->first_partial = first_partial;
    first_item += work->num_items();
    first_arrival += work->num_arrivals();
    first_partial += work->num_partials() * schedule.partial_floats(*work);
  }
  return end;
}

void run_batch(const AttentionBatch& batch, const Schedule& schedule, std::string_view variant, int64_t workspace_bytes,
               char* scratch) {
  const Isa& isa = isa_named(variant);
  const RunLayout layout = run_layout(batch, schedule, isa);
  auto* works = reinterpret_cast<SequenceWork*>(scratch + layout.works);
  const SequenceWork* end = place_works(batch, schedule, layout.num_long, works);
  auto* arrivals = reinterpret_cast<int32_t*>(scratch + layout.arrivals);
  std::fill(arrivals, arrivals + layout.num_arrivals, 0);
  const Run run{{batch, schedule, isa, layout.worker},
                works,
                end,
                arrivals,
                reinterpret_cast<float*>(scratch + layout.partials),
                scratch + layout.workers};
  // The plan counted the threads; the machine's answer may have changed since.
  const int num_threads = static_cast<int>((workspace_bytes - layout.workers) / layout.worker.bytes);
  for (int worker = 0; worker < num_threads; ++worker)
    new (run.workers + worker * layout.worker.bytes + layout.worker.loaded) LoadedQueries;
  parallel_for(num_threads, layout.num_items, [&run](int64_t item, int worker) { run_item(run, item, worker); });
}

}  // namespace

void run_decode(const DecodeParams& params, const Execution&, const DecodePlan& plan, Workspace workspace) {
  const AttentionBatch batch = batch_of(params);
  run_batch(batch, Schedule(batch, params.num_splits, plan.split_size), plan.variant, plan.workspace_bytes,
            static_cast<char*>(workspace.scratch));
}

void run_hybrid(const HybridParams& params, const Execution&, const HybridPlan& plan, Workspace workspace) {
  const AttentionBatch batch = batch_of(params);
  run_batch(batch, Schedule(batch, params.num_splits, plan.split_size), plan.variant, plan.workspace_bytes,
            static_cast<char*>(workspace.scratch));
}

void run_prefill(const PrefillParams& params, const Execution&, const PrefillPlan& plan, void* scratch) {
  const AttentionBatch batch = batch_of(params);
  run_batch(batch, Schedule(batch, 0, kBatchInvariantSplit), plan.variant, plan.workspace_bytes, static_cast<char*>(scratch));
}

}  // namespace quantattn::cpu
