// A barrier for the threads of one parallel region that suits cores which are shared with other processes.
//
// OpenMP's own barrier spins for milliseconds, which keeps the thread that it waits for off its core whenever somebody
// else (the HTTP server, say) runs there too; told not to spin, it sleeps at once and pays for every wake-up. This one
// spins for about as long as threads differ within an operation, and then sleeps.
#pragma once

#include <omp.h>

#include <atomic>

namespace logitkernels {

class Barrier {
   public:
    void wait() {
        const int threads = omp_get_num_threads();
        if (threads == 1) return;
        const unsigned round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            round_.notify_all();  // costs nothing while nobody sleeps
            return;
        }
        for (int looks = 0; looks < kSpins; ++looks) {
            if (round_.load(std::memory_order_acquire) != round) return;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            asm volatile("yield");
#endif
        }
        round_.wait(round, std::memory_order_acquire);
    }

   private:
    static constexpr int kSpins = 1000;  // 10 to 50 us, by the processor's pause

    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> round_{0};
};

// The barrier of the region that this thread works in; none: OpenMP's own.
inline thread_local Barrier* region_barrier = nullptr;

// Says for a scope inside a parallel region which barrier its threads meet at.
class Team {
   public:
    explicit Team(Barrier& barrier) { region_barrier = &barrier; }
    ~Team() { region_barrier = nullptr; }
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;
};

// Every thread of the enclosing region waits for all others. Outside a region it returns at once.
inline void team_barrier() {
    if (region_barrier != nullptr) {
        region_barrier->wait();
        return;
    }
#pragma omp barrier
}

}  // namespace logitkernels
