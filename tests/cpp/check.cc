#include "check.h"

#include <atomic>
#include <cstdio>

namespace quantattn_test {
namespace {
std::atomic<int> num_failures{0};
constexpr int kMaxPrinted = 20;
}  // namespace

void report_failure(const char* file, int line, const std::string& message) {
  if (++num_failures <= kMaxPrinted) std::fprintf(stderr, "%s:%d: %s\n", file, line, message.c_str());
}

int finish(const char* program) {
  std::printf("%s: %d failed checks\n", program, num_failures.load());
  return num_failures == 0 ? 0 : 1;
}

}  // namespace quantattn_test
