#include "cpu/openmp_team.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

namespace quantattn::cpu {
namespace {

// The entry points of GNU's runtime, which LLVM's and Intel's have as well.
struct OpenMpRuntime {
  void (*parallel)(void (*task)(void*), void* data, unsigned num_threads, unsigned flags) = nullptr;
  int (*max_threads)() = nullptr;
};

// Remembers the first OpenMP library of the process, or torch's where there are several.
int remember_runtime(dl_phdr_info* library, size_t, void* path) {
  const char* slash = std::strrchr(library->dlpi_name, '/');
  const char* name = slash ? slash + 1 : library->dlpi_name;
  bool is_runtime = false;
  for (const char* known : {"libgomp", "libiomp5", "libomp"})
    is_runtime = is_runtime || std::strncmp(name, known, std::strlen(known)) == 0;
  auto* found = static_cast<std::string*>(path);
  const bool is_torch = std::strstr(library->dlpi_name, "torch") != nullptr;
  if (is_runtime && (found->empty() || is_torch)) *found = library->dlpi_name;
  return is_runtime && is_torch;
}

OpenMpRuntime find_runtime() {
  std::string path;
  dl_iterate_phdr(remember_runtime, &path);
  OpenMpRuntime runtime;
  void* library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return runtime;
  runtime.parallel = reinterpret_cast<decltype(runtime.parallel)>(dlsym(library, "GOMP_parallel"));
  runtime.max_threads = reinterpret_cast<decltype(runtime.max_threads)>(dlsym(library, "omp_get_max_threads"));
  if (!runtime.parallel || !runtime.max_threads) return {};
  return runtime;
}

// A forked child has none of the team's threads, and the runtime waits for them for ever.
std::atomic<bool> is_forked_child{false};
[[maybe_unused]] const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { is_forked_child.store(true, std::memory_order_relaxed); });

}  // namespace

bool run_on_openmp_team(int num_threads, void (*task)(void*), void* data) {
  static const OpenMpRuntime runtime = find_runtime();
  if (!runtime.parallel || is_forked_child.load(std::memory_order_relaxed)) return false;
  // The team as the process uses it: another size would make the runtime end threads and start them again.
  runtime.parallel(task, data, static_cast<unsigned>(std::max(num_threads, runtime.max_threads())), 0);
  return true;
}

}  // namespace quantattn::cpu
