// The threads of one parallel region: where they run, and a barrier that suits cores which are shared with other processes.
//
// OpenMP's own barrier spins for milliseconds, which keeps the thread that it waits for off its core whenever somebody
// else (the HTTP server, say) runs there too; told not to spin, it sleeps at once and pays for every wake-up. This one
// spins for about as long as threads differ within an operation, and then sleeps.
#pragma once

#include <omp.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <vector>

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

// The CPU that each thread of a region stays on, by its number there. Empty: the scheduler chooses.
//
// It does so badly for threads that meet many thousand times a second. When another process (the HTTP server, say) takes a
// core for half a millisecond, the thread that it displaces may be put beside its partner, and then the two take turns by
// time slices of milliseconds until somebody notices that the core is free again: one step in ten took three times as long.
inline std::vector<int> region_cpus;

inline void stay_on_own_cpu() {
#if defined(__linux__)
    thread_local int stays_on = -1;
    if (region_cpus.empty()) return;
    const int cpu = region_cpus[size_t(omp_get_thread_num()) % region_cpus.size()];
    if (cpu == stays_on) return;
    stays_on = cpu;
    cpu_set_t* set = CPU_ALLOC(cpu + 1);
    CPU_ZERO_S(CPU_ALLOC_SIZE(cpu + 1), set);
    CPU_SET_S(cpu, CPU_ALLOC_SIZE(cpu + 1), set);
    sched_setaffinity(0, CPU_ALLOC_SIZE(cpu + 1), set);  // where it may not, the scheduler goes on choosing
    CPU_FREE(set);
#endif
}

// Says for a scope inside a parallel region which barrier its threads meet at.
class Team {
   public:
    explicit Team(Barrier& barrier) {
        region_barrier = &barrier;
        stay_on_own_cpu();
    }
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
