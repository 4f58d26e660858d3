#include "binding/attention_run.h"

namespace quantattn::binding {
namespace {

thread_local KernelRun last_run;
std::string forced_variant;

}  // namespace

void set_forced_kernel(std::string variant) { forced_variant = std::move(variant); }
std::string forced_kernel() { return forced_variant; }

void set_last_kernel(const KernelRun& run) { last_run = run; }

py::object last_kernel() {
  if (last_run.operation.empty()) return py::none();
  return py::make_tuple(std::string(last_run.backend), std::string(last_run.variant), last_run.num_splits, last_run.split_size,
                        std::string(last_run.operation));
}

}  // namespace quantattn::binding
