// The threads of one parallel region: where they run, how they share work, and a barrier that suits cores which are shared
// with other processes.
//
// OpenMP's own barrier spins for milliseconds, which keeps the thread that it waits for off its core whenever somebody
// else (the HTTP server, say) runs there too; told not to spin, it sleeps at once and pays for every wake-up. This one
// spins for about as long as threads differ within an operation, and then sleeps.
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

// The calling thread's place in the region that it works in.
struct Place {
    Team* team = nullptr;
    int thread = 0;
    int threads = 1;
};
inline thread_local Place place;

class Team {
   public:
    // Looks at a barrier before a thread sleeps: 10 to 50 us, by the processor's pause.
    static constexpr int kSpins = 1000;

    explicit Team(int threads, int spins = kSpins) : spins_(spins), taken_(new Counter[size_t(threads)]) {}

    // Every thread waits for all others.
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

    // body(0) to body(count - 1), each by one thread, and a barrier. A thread does its own share in order, and then what
    // others have not begun of theirs: memory, and whoever else uses the cores, never serve all threads alike.
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
    // Who goes to sleep says so before it looks at the round for the last time, and who ends a round looks for sleepers
    // after it: all of that in one order that every thread sees, or a sleeper could be overlooked. Nor is one wake-up
    // worth a server that hangs: a sleeper looks again after a while. (std::atomic's wait offers neither.)
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

// The CPU that each thread of a region stays on, by its number there. Empty: the scheduler chooses.
//
// It does so badly for threads that meet many thousand times a second. When another process (the HTTP server, say) takes a
// core for half a millisecond, the thread that it displaces may be put beside its partner, and then the two take turns by
// time slices of milliseconds until somebody notices that the core is free again: one step in ten took three times as long.
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
    sched_setaffinity(0, CPU_ALLOC_SIZE(cpu + 1), set);  // where it may not, the scheduler goes on choosing
    CPU_FREE(set);
}

// work() by each thread of a parallel region, which the functions that share theirs need around them.
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
