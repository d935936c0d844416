// The threads of one parallel region: their CPUs, their sharing of work, and a barrier for cores that are
// shared with other processes.
//
// OpenMP's own barrier spins for milliseconds. When another process (the HTTP server, say) runs on the same
// cores, the spinning keeps the awaited thread off its core. Without spinning, OpenMP's barrier sleeps at
// once and pays for every wake-up. This barrier spins for about as long as threads differ within an
// operation, and then sleeps.
#pragma once

#include <omp.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace logitkernels {

class Team;

// The calling thread's place in its parallel region.
struct Place {
    Team* team = nullptr;
    int thread = 0;
    int threads = 1;
};
inline thread_local Place place;

class Team {
   public:
    // Checks of a barrier before a thread sleeps: 10 to 50 us, depending on the processor's pause
    // instruction.
    static constexpr int kSpins = 1000;

    explicit Team(int threads, int spins = kSpins) : spins_(spins), taken_(new Counter[size_t(threads)]) {}

    // Waits until all threads have arrived.
    void barrier() {
        if (place.threads == 1) return;
        const unsigned round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == place.threads) {
            arrived_.store(0, std::memory_order_relaxed);
            for (int t = 0; t < place.threads; ++t) taken_[size_t(t)].value.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_seq_cst);
            wake_sleepers();
            return;
        }
        for (int looks = 0; looks < spins_; ++looks) {
            if (round_.load(std::memory_order_acquire) != round) return;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            asm volatile("yield");
#endif
        }
        sleep_while(round);
    }

    // Runs body(0) to body(count - 1), each in one thread, and a barrier. A thread does its own share in
    // order, and then the items that other threads have not begun. Memory and other processes never serve all
    // threads equally.
    template <class Body>
    void share(int64_t count, const Body& body) {
        const int threads = place.threads;
        if (threads == 1) {
            for (int64_t item = 0; item < count; ++item) body(item);
            return;
        }
        for (int t = 0; t < threads; ++t) {
            const int owner = (place.thread + t) % threads;
            const int64_t first = count * owner / threads, items = count * (owner + 1) / threads - first;
            std::atomic<int64_t>& taken = taken_[size_t(owner)].value;
            while (taken.load(std::memory_order_relaxed) < items) {
                const int64_t item = taken.fetch_add(1, std::memory_order_relaxed);
                if (item < items) body(first + item);
            }
        }
        barrier();
    }

   private:
    // A thread that goes to sleep counts itself as a sleeper before it checks the round for the last time.
    // The thread that ends a round checks for sleepers afterwards. Both need one order that every thread
    // sees, or a sleeper could be overlooked. A lost wake-up would hang the server, so a sleeper also checks
    // again after a while. std::atomic's wait offers neither.
    void sleep_while(unsigned round) {
        const timespec while_asleep{0, 10'000'000};
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        while (round_.load(std::memory_order_seq_cst) == round)
            syscall(SYS_futex, &round_, FUTEX_WAIT_PRIVATE, round, &while_asleep, nullptr, 0);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }
    void wake_sleepers() {
        if (sleepers_.load(std::memory_order_seq_cst) > 0)
            syscall(SYS_futex, &round_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
    }

    struct alignas(64) Counter {
        std::atomic<int64_t> value{0};
    };

    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> round_{0};
    static_assert(sizeof(round_) == 4, "a futex is a word");
    alignas(64) std::atomic<int> sleepers_{0};
    const int spins_;
    std::unique_ptr<Counter[]> taken_;
};

// CPU of each thread of a region, by the thread's number there. When empty, the scheduler chooses.
//
// The scheduler chooses badly for threads that meet many thousand times a second. When another process (the
// HTTP server, say) takes a core for half a millisecond, the displaced thread may be put on the core of its
// partner. The two then take turns by time slices of milliseconds until the scheduler uses the free core
// again: one step in ten took three times as long.
inline std::vector<int> region_cpus;

inline void stay_on_own_cpu() {
    thread_local int stays_on = -1;
    if (region_cpus.empty()) return;
    const int cpu = region_cpus[size_t(place.thread) % region_cpus.size()];
    if (cpu == stays_on) return;
    stays_on = cpu;
    cpu_set_t* set = CPU_ALLOC(cpu + 1);
    CPU_ZERO_S(CPU_ALLOC_SIZE(cpu + 1), set);
    CPU_SET_S(cpu, CPU_ALLOC_SIZE(cpu + 1), set);
    sched_setaffinity(0, CPU_ALLOC_SIZE(cpu + 1), set);  // if it is not allowed, the scheduler still chooses
    CPU_FREE(set);
}

// Runs work() in each thread of a parallel region. Functions that share their work must be called inside it.
template <class Work>
void in_team(int threads, const Work& work) {
    Team team(threads);
#pragma omp parallel num_threads(threads)
    {
        place = {&team, omp_get_thread_num(), omp_get_num_threads()};
        stay_on_own_cpu();
        work();
        place = {};
    }
}

template <class Body>
void share(int64_t count, const Body& body) {
    place.team->share(count, body);
}

}  // namespace logitkernels
