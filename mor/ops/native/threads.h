// A team of OpenMP threads that goes through phases together.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
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
  // Spin at first, since phases are short. Then sleep, which the system makes up for by waking us
  // at once; to go on spinning, or to yield, would cost a time slice beside a busy program.
  void wait(int threads) {
    if (threads == 1) return;
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_seq_cst);
      if (sleeping_.load(std::memory_order_seq_cst)) wake();
      return;
    }
    for (int spins = 0; spins < kSpins; spins++) {
      if (round_.load(std::memory_order_acquire) != round) return;
      pause_briefly();
    }
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    while (round_.load(std::memory_order_seq_cst) == round) sleep(round);
    sleeping_.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  static constexpr int kSpins = 5000;

  void sleep(int round) {
#if defined(__linux__)
    syscall(SYS_futex, (int*)&round_, FUTEX_WAIT_PRIVATE, round, nullptr, nullptr, 0);
#elif defined(__APPLE__)
    (void)round;
    sched_yield();
#endif
  }
  void wake() {
#if defined(__linux__)
    syscall(SYS_futex, (int*)&round_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#endif
  }

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
  std::atomic<int> sleeping_{0};
};

struct Range {
  long begin, end;
};

// Hands out the jobs of phases, one counter a phase.
class Jobs {
 public:
  // The counter of the call-th phase; the one that is used half a round later starts again.
  std::atomic<long>& counter(long call) {
    counters_[(call + kRound / 2) % kRound].next.store(0, std::memory_order_relaxed);
    return counters_[call % kRound].next;
  }

 private:
  // Threads are never further apart than a barrier lets them: fewer calls than half a round.
  static constexpr long kRound = 8;
  struct alignas(64) Counter {
    std::atomic<long> next{0};
  };
  Counter counters_[kRound];
};

struct Team {
  int thread;
  int threads;
  Barrier* barrier;
  Jobs* jobs;
  mutable long calls = 0;

  void wait() const { barrier->wait(threads); }

  // This thread's share of count jobs, as one run: for what is short.
  Range share(long count) const {
    return {count * thread / threads, count * (thread + 1) / threads};
  }

  // Call work(job, following) for jobs in order, each on whichever thread is free: another program
  // may have slowed one of them. A job's follower on this thread is known early, to fetch for it;
  // it is count or more where there is none. At most three such calls lie between two barriers.
  template <class Work>
  void take_jobs(long count, Work work) const {
    std::atomic<long>& next = jobs->counter(calls++);
    auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
    for (long job = take(), following; job < count; job = following) {
      following = take();
      work(job, following);
    }
  }
};

// Run work(team) on up to so many threads; it must not throw.
template <class Work>
static inline void run_team(int threads, Work work) {
  Barrier barrier;
  Jobs jobs;
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier, &jobs});
    return;
  }
#endif
  (void)threads;
  work(Team{0, 1, &barrier, &jobs});
}
