// Prefetching of memory.
#pragma once

#include <algorithm>

#include "vector.h"

namespace logitkernels {

// Memory to fetch, some lines at a time between other work. The processor can have only few misses in flight,
// and a burst of fetches would delay the loads behind it.
class Fetcher {
  public:
    explicit Fetcher(int64_t capacity) : spans_(allocate<Span>(capacity)) {}

    // `once`: fetch into the first-level cache alone, for memory that fits there until it is read.
    void begin(bool once) {
        once_ = once;
        position_ = count_ = lines_ = 0;
        next_ = end_ = nullptr;
    }
    void add(const void* start, int64_t bytes) {
        const char* from = static_cast<const char*>(start);
        if (count_ > 0 && spans_[count_ - 1].end == from)
            spans_[count_ - 1].end += bytes;
        else
            spans_[count_++] = {from, from + bytes};
        lines_ += ceil_div(bytes, 64);
    }
    // Spreads the fetch of the added memory over `steps` steps.
    void spread(int64_t steps) { lines_per_step_ = ceil_div(lines_, std::max<int64_t>(steps, 1)); }

    LOGITKERNELS_INLINE void step() {
        for (int64_t line = 0; line < lines_per_step_; ++line) {
            if (next_ >= end_) {
                if (position_ == count_) {
                    lines_per_step_ = 0;
                    return;
                }
                next_ = spans_[position_].next;
                end_ = spans_[position_++].end;
            }
            once_ ? prefetch_once(next_) : prefetch(next_);
            next_ += 64;
        }
    }
    // Takes one step for every two vectors of 16 that a loop reads meanwhile.
    template <int V>
    LOGITKERNELS_INLINE void beside() {
#pragma GCC unroll 2
        for (int v = 0; v < V; v += 2) step();
    }

  private:
    struct Span {
        const char* next;
        const char* end;
    };
    Buffer<Span> spans_;
    int64_t position_ = 0, count_ = 0, lines_ = 0, lines_per_step_ = 1;
    const char *next_ = nullptr, *end_ = nullptr;
    bool once_ = false;
};

}  // namespace logitkernels
