// A team of OpenMP threads that goes through phases together.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

static inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Barrier {
 public:
  // Spin at first, since phases are short; give way when another program has the core.
  void wait(int threads) {
    if (threads == 1) return;
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
      if (spins < kSpins) pause_briefly();
#if defined(__unix__) || defined(__APPLE__)
      else sched_yield();
#endif
    }
  }

 private:
  static constexpr int kSpins = 20000;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

struct Range {
  long begin, end;
};

struct Team {
  int thread;
  int threads;
  Barrier* barrier;

  void wait() const { barrier->wait(threads); }

  // This thread's share of count jobs, as one run.
  Range share(long count) const {
    return {count * thread / threads, count * (thread + 1) / threads};
  }
};

// Run work(team) on up to so many threads; it must not throw.
template <class Work>
static inline void run_team(int threads, Work work) {
  Barrier barrier;
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
    return;
  }
#endif
  work(Team{0, 1, &barrier});
}
