#pragma once

#include <string>

#include "binding/workspace.h"
#include "quantattn/decode.h"

namespace quantattn::binding {

// Forces one kernel variant for every attention call of the process; "" returns to the backend's choice.
void set_forced_kernel(std::string variant);
std::string forced_kernel();

// What one attention call ran.
struct KernelRun {
  std::string_view operation, backend, variant;
  int num_splits = 1, split_size = 0;
};
void set_last_kernel(const KernelRun& run);
// The latest attention call of this thread as (backend, variant, num_splits, split_size, operation); None before the first.
py::object last_kernel();

template <class Plan>
KernelRun kernel_run(std::string_view operation, const Plan& plan) {
  KernelRun run{.operation = operation, .backend = plan.backend, .variant = plan.variant};
  if constexpr (requires { plan.num_splits; }) {
    run.num_splits = plan.num_splits;
    run.split_size = plan.split_size;
  }
  return run;
}

template <class Plan>
int64_t counter_bytes(const Plan& plan) {
  if constexpr (requires { plan.counter_bytes; }) return plan.counter_bytes;
  return 0;
}

// Plans a call and runs the plan on the device of `q`: `make_plan(execution)`, then `run(execution, plan, workspace)`.
template <class MakePlan, class Run>
void plan_and_run(std::string_view who, const Tensor& q, MakePlan make_plan, Run run) {
  const std::string forced = forced_kernel();  // a copy: another thread may change it while this one runs without the GIL
  Execution execution = execution_on(q);
  execution.kernel = forced;
  if (execution.device.kind == DeviceKind::kCpu) {
    // The lengths that a CPU plan was made from are read again by the run, with no Python in between.
    const py::gil_scoped_release release;
    const auto plan = make_plan(execution);
    set_last_kernel(kernel_run(who, plan));
    run(execution, plan, Workspace{cpu_scratch(plan.workspace_bytes), nullptr});
    return;
  }
  const auto plan = make_plan(execution);
  set_last_kernel(kernel_run(who, plan));
  const CudaScratch scratch(who, q, plan.workspace_bytes);
  const int64_t bytes = counter_bytes(plan);
  void* const counters = bytes > 0 ? cuda_counters(execution.device, execution.stream, bytes) : nullptr;
  const py::gil_scoped_release release;
  run(execution, plan, Workspace{scratch.data(), counters});
}

}  // namespace quantattn::binding
