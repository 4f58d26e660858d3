#include "cpu/thread_pool.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "core/fail.h"
#include "cpu/float_environment.h"
#include "cpu/openmp_team.h"

namespace quantattn::cpu {
namespace {

constexpr int kMaxThreads = 256;
// About 20 us: the gap between two layers of a small model. Longer idling gives the core back.
constexpr int kSpins = 1000;

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Waits until `word` differs from `old`.
uint32_t wait_for_change(const std::atomic<uint32_t>& word, uint32_t old) {
  for (int spin = 0; spin < kSpins; ++spin) {
    const uint32_t value = word.load(std::memory_order_acquire);
    if (value != old) return value;
    pause_briefly();
  }
  word.wait(old, std::memory_order_acquire);
  return word.load(std::memory_order_acquire);
}

struct Job {
  Work work = nullptr;
  const void* context = nullptr;
  int64_t num_items = 0;
  std::atomic<int64_t> next_item{0};

  void take_items(int worker) {
    const DefaultFloatEnvironment environment;
    for (int64_t item = next_item++; item < num_items; item = next_item++) work(context, item, worker);
  }
};

class ThreadPool {
 public:
  ~ThreadPool() {
    gate_.store(kStop, std::memory_order_release);
    gate_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  // False where another call holds the pool.
  bool try_run(int num_threads, int64_t num_items, Work work, const void* context) {
    if (in_use_.test_and_set(std::memory_order_acquire)) return false;
    while (static_cast<int>(workers_.size()) < num_threads - 1) workers_.emplace_back([this] { serve(); });
    job_.work = work;
    job_.context = context;
    job_.num_items = num_items;
    job_.next_item.store(0, std::memory_order_relaxed);
    num_left_.store(0, std::memory_order_relaxed);
    epoch_ = (epoch_ + 1) & kMaxEpoch;
    const uint32_t num_seats = static_cast<uint32_t>(num_threads - 1);
    gate_.store(epoch_ << kSeatBits | num_seats, std::memory_order_release);
    gate_.notify_all();
    job_.take_items(0);
    // Workers that have not sat down by now find no seat, so nobody waits for a thread that is still asleep.
    const uint32_t free_seats = gate_.exchange(epoch_ << kSeatBits, std::memory_order_acq_rel) & kSeatMask;
    const uint32_t num_joined = num_seats - free_seats;
    for (uint32_t left = num_left_.load(std::memory_order_acquire); left != num_joined;)
      left = wait_for_change(num_left_, left);
    in_use_.clear(std::memory_order_release);
    return true;
  }

 private:
  // The gate holds the job's number and the free seats in one word, so that joining a job is one compare-and-swap.
  static constexpr int kSeatBits = 8;
  static constexpr uint32_t kSeatMask = (1u << kSeatBits) - 1;
  static constexpr uint32_t kMaxEpoch = (1u << (32 - kSeatBits)) - 2;
  static constexpr uint32_t kStop = ~0u;
  static_assert(kMaxThreads - 1 <= kSeatMask);

  void serve() {
    uint32_t seen = 0;
    for (;;) {
      seen = wait_for_change(gate_, seen);
      if (seen == kStop) return;
      while ((seen & kSeatMask) != 0 && seen != kStop)
        if (gate_.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
          job_.take_items(static_cast<int>(seen & kSeatMask));
          num_left_.fetch_add(1, std::memory_order_acq_rel);
          num_left_.notify_one();
          seen -= 1;
          break;
        }
      if (seen == kStop) return;
    }
  }

  std::atomic_flag in_use_;
  std::vector<std::thread> workers_;
  Job job_;
  uint32_t epoch_ = 0;
  std::atomic<uint32_t> gate_{0};
  std::atomic<uint32_t> num_left_{0};
};

// A forked child has none of its parent's threads and may find the parent's locks taken: it starts a pool of its own and
// abandons the inherited object, which must not be destroyed there (its threads cannot be joined).
struct PoolOfProcess {
  pid_t pid;
  std::unique_ptr<ThreadPool> pool = std::make_unique<ThreadPool>();
  explicit PoolOfProcess(pid_t owner) : pid(owner) {}
  ~PoolOfProcess() {
    if (pid != getpid()) static_cast<void>(pool.release());
  }
};

ThreadPool& pool_of_this_process() {
  static PoolOfProcess first(getpid());
  static std::atomic<PoolOfProcess*> current{&first};
  const pid_t pid = getpid();
  PoolOfProcess* pool = current.load(std::memory_order_acquire);
  while (pool->pid != pid) {
    auto fresh = std::make_unique<PoolOfProcess>(pid);
    if (current.compare_exchange_strong(pool, fresh.get(), std::memory_order_acq_rel, std::memory_order_acquire))
      pool = fresh.release();
  }
  return *pool->pool;
}

// A job for a team that may be larger or smaller than asked for: who comes first works.
struct TeamJob : Job {
  int num_workers = 0;
  std::atomic<int> next_worker{0};
};

void take_items_of(void* team_job) {
  auto* job = static_cast<TeamJob*>(team_job);
  const int worker = job->next_worker.fetch_add(1, std::memory_order_relaxed);
  if (worker < job->num_workers) job->take_items(worker);
}

}  // namespace

int num_usable_cores() {
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof cores, &cores) == 0) return std::max(1, CPU_COUNT(&cores));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

int resolve_num_threads(const Execution& execution) {
  require(execution.num_threads >= 0, "cpu: num_threads must be at least 0 (every core), got ", execution.num_threads);
  return execution.num_threads > 0 ? execution.num_threads : num_usable_cores();
}

void parallel_for(int num_threads, int64_t num_items, Work work, const void* context) {
  const int useful = static_cast<int>(std::min<int64_t>(std::min(num_threads, kMaxThreads), num_items));
  TeamJob job;
  job.work = work;
  job.context = context;
  job.num_items = num_items;
  job.num_workers = useful;
  if (useful > 1 && run_on_openmp_team(useful, take_items_of, &job)) return;
  if (useful > 1 && pool_of_this_process().try_run(useful, num_items, work, context)) return;
  job.take_items(0);
}

}  // namespace quantattn::cpu
