// Runs attention over a quantised KV cache, or over fresh K and V, from the command line and checks it against float64: see
// --help.
#include <iostream>
#include <new>
#include <vector>

#include "experiment.h"
#include "option_parser.h"
#include "options.h"
#include "quantattn/quantattn.h"
#include "report.h"

namespace sample_runner {
namespace {

enum ExitCode { kFine = 0, kWrongResult = 1, kBadUsage = 2, kNotSupported = 3 };

// A row of built_decode_kernels() or built_prefill_kernels().
template <class Kernel, class Format>
void print_kernel(std::string_view kind, const Kernel& kernel, Format format) {
  std::cout << kind << " kernel " << kernel.backend << ' ' << kernel.variant << ' ' << quantattn::name(format) << ": head_dim "
            << kernel.min_head_dim << " to " << kernel.max_head_dim << " in steps of " << kernel.head_dim_multiple
            << (kernel.runs_here ? "" : " (not on this machine)") << '\n';
}

void print_info() {
  std::cout << "quantattn " << quantattn::version() << '\n';
  for (const quantattn::BackendInfo& backend : quantattn::built_backends())
    std::cout << "backend " << backend.name << ": " << backend.num_devices << " device(s); " << backend.status << '\n';
  for (const quantattn::KernelInfo& kernel : quantattn::built_decode_kernels()) print_kernel("decode", kernel, kernel.format);
  for (const quantattn::PrefillKernelInfo& kernel : quantattn::built_prefill_kernels())
    print_kernel("prefill", kernel, kernel.dtype);
}

int run(const Options& options) {
  const std::unique_ptr<DeviceMemory> memory = open_device(options.device);
  const Problem problem = make_problem(options);
  ReportWriter report(std::cout, options.report);
  int exit_code = kFine;
  for (KvSource source : options.sources) {
    Outcome outcome;
    try {
      outcome = run_experiment(problem, source, options, *memory);
    } catch (const quantattn::Unsupported& error) {
      outcome.status = Status::kUnsupported;
      outcome.messages = {error.what()};
    }
    report.write(problem, source, options, outcome);
    for (const std::string& message : outcome.messages)
      std::cerr << "sample_runner: " << name(source) << ": " << message << '\n';
    if (outcome.status == Status::kMismatch) exit_code = kWrongResult;
    if (outcome.status == Status::kUnsupported && exit_code == kFine) exit_code = kNotSupported;
  }
  report.finish();
  return exit_code;
}

int run_command_line(const std::vector<std::string_view>& arguments) {
  const Options options = parse_command_line(arguments);
  if (options.wants_help) std::cout << help_text();
  if (options.wants_info && !options.wants_help) print_info();
  return options.wants_help || options.wants_info ? kFine : run(options);
}

int fail(ExitCode exit_code, const char* message) {
  std::cerr << "sample_runner: " << message << '\n';
  return exit_code;
}

}  // namespace
}  // namespace sample_runner

int main(int argc, char** argv) {
  using namespace sample_runner;
  try {
    return run_command_line({argv + 1, argv + argc});
  } catch (const UsageError& error) {
    return fail(kBadUsage, error.what());
  } catch (const quantattn::InvalidArgument& error) {
    return fail(kBadUsage, error.what());
  } catch (const std::bad_alloc&) {
    return fail(kNotSupported, "the device has too little memory for this problem");
  } catch (const std::exception& error) {  // Unsupported, DeviceError, or the system
    return fail(kNotSupported, error.what());
  }
}
