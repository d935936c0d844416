// Operations on rows of logits [rows, vocab], float32. One thread reads a row once: 4 bytes per logit.
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "top_k.h"
#include "vector.h"

namespace logitkernels {
namespace {

// log(sum(exp(row))): float32 exponentials, and float64 sums in 16 lanes in the order of the row.
float log_sum_exp(const float* row, int64_t size) {
    const float top = largest_of(row, size);
    if (!std::isfinite(top)) return top;
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    for (int64_t i = 0; i < size; i += kLanes) {
        const __mmask16 exists = lane_mask(size - i);
        const __m512 shifted = _mm512_sub_ps(load(row + i, exists), _mm512_set1_ps(top));
        const __m512 e = _mm512_maskz_mov_ps(exists, exponential(shifted));
        low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(e)));
        high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(e, 1)));
    }
    return float(double(top) + std::log(_mm512_reduce_add_pd(_mm512_add_pd(low, high))));
}

void softcap(const float* logits, float cap, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const __mmask16 exists = lane_mask(count - i);
        store(out + i, exists, softcapped(load(logits + i, exists), _mm512_set1_ps(cap)));
    }
}

}  // namespace
}  // namespace logitkernels

using namespace logitkernels;

extern "C" {

void logitkernels_top_k(const float* logits, int64_t rows, int64_t vocab, int64_t k, int64_t* ids, float* values,
                        int threads) {
#pragma omp parallel num_threads(threads)
    {
        TopK top(k);
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < rows; ++row) top.select(logits + row * vocab, vocab, ids + row * k, values + row * k);
    }
}

void logitkernels_log_sum_exp(const float* logits, int64_t rows, int64_t vocab, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t row = 0; row < rows; ++row) out[row] = log_sum_exp(logits + row * vocab, vocab);
}

// cap * tanh(logit / cap) of each of `count` logits.
void logitkernels_softcap(const float* logits, float cap, int64_t count, float* out, int threads) {
    constexpr int64_t chunk = 4096;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += chunk) softcap(logits + i, cap, std::min(chunk, count - i), out + i);
}

// Counts the entries of each row that are larger than its bound. A NaN is not counted.
void logitkernels_count_above(const float* logits, const float* bounds, int64_t rows, int64_t vocab, int64_t* out,
                              int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t row = 0; row < rows; ++row) {
        const float *values = logits + row * vocab, bound = bounds[row];
        int32_t above = 0;
        for (int64_t i = 0; i < vocab; ++i) above += values[i] > bound;
        out[row] = above;
    }
}

}  // extern "C"
