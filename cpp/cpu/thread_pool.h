#pragma once

#include <cstdint>

#include "quantattn/types.h"

namespace quantattn::cpu {

// Cores that this process may use.
int num_usable_cores();
// Threads that a call asks for.
int resolve_num_threads(const Execution& execution);

// Calls work(context, item, worker) once for every item in [0, num_items), on at most `num_threads` threads, the caller
// among them; `worker` is in [0, num_threads) and no two concurrent calls share it. Items are handed out in order. The threads
// are those of the OpenMP runtime that the process has loaded, else a pool of our own; while another call holds the pool (or
// from within `work`) the caller does everything itself. Every thread computes in the default
// floating-point environment: round to nearest, subnormals kept.
using Work = void (*)(const void* context, int64_t item, int worker);
void parallel_for(int num_threads, int64_t num_items, Work work, const void* context);

// As above, for a callable (item, worker).
template <class Body>
void parallel_for(int num_threads, int64_t num_items, const Body& body) {
  parallel_for(
      num_threads, num_items,
      [](const void* context, int64_t item, int worker) { (*static_cast<const Body*>(context))(item, worker); }, &body);
}

}  // namespace quantattn::cpu
