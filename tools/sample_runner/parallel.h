#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace sample_runner {

// Calls body(i) for i in [0, count) on every core. The body must not throw.
template <class Body>
void parallel_for(int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i = next++; i < count; i = next++) body(i);
  };
  std::vector<std::jthread> others;
  for (unsigned i = 1; i < std::thread::hardware_concurrency() && static_cast<int64_t>(i) < count; ++i)
    others.emplace_back(work);
  work();
}

}  // namespace sample_runner
