// Operations on rows of logits [rows, vocab], float32. A row is read once by one thread: 4 bytes a logit.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vector.h"

namespace logitkernels {
namespace {

// Integers in the order of the floats they stand for, except that both zeros are one and every NaN is the largest.
inline __m512i order_keys(__m512 values) {
    const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m512i bits = _mm512_castps_si512(_mm512_add_ps(values, _mm512_setzero_ps()));
    const __m512i flips = _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7fffffff));
    return _mm512_mask_mov_epi32(_mm512_xor_si512(bits, flips), is_nan, _mm512_set1_epi32(0x7fffffff));
}

// An entry of a row; the better one has the larger key or, at the same key, the lower id.
struct Candidate {
    int32_t key;
    int32_t id;
    bool operator<(const Candidate& other) const { return key != other.key ? key > other.key : id < other.id; }
};

// Keeps every entry above a threshold that rises whenever the buffer is full, so a row is looked at once and never sorted.
class TopK {
  public:
    explicit TopK(int64_t k) : k_(k), buffer_(size_t(2 * k + 512)) {}

    void select(const float* row, int64_t size, int64_t* ids, float* values) {
        count_ = 0;
        threshold_ = std::numeric_limits<int32_t>::min();
        for (int64_t i = 0; i < size; i += kLanes) {
            const __mmask16 exists = lane_mask(size - i);
            const __m512i keys = order_keys(load(row + i, exists));
            // Strictly above: an equal entry further on has a higher id and loses.
            __mmask16 better = _mm512_mask_cmpgt_epi32_mask(exists, keys, _mm512_set1_epi32(threshold_));
            if (better == 0) continue;
            alignas(64) int32_t lanes[kLanes];
            _mm512_store_si512(lanes, keys);
            for (; better != 0; better = __mmask16(better & (better - 1))) {
                const int lane = __builtin_ctz(better);
                buffer_[size_t(count_++)] = {lanes[lane], int32_t(i + lane)};
            }
            if (count_ + kLanes > int64_t(buffer_.size())) shrink();
        }
        std::partial_sort(buffer_.begin(), buffer_.begin() + k_, buffer_.begin() + count_);
        for (int64_t i = 0; i < k_; ++i) {
            ids[i] = buffer_[size_t(i)].id;
            values[i] = row[ids[i]];
        }
    }

  private:
    void shrink() {
        std::nth_element(buffer_.begin(), buffer_.begin() + (k_ - 1), buffer_.begin() + count_);
        count_ = k_;
        threshold_ = buffer_[size_t(k_ - 1)].key;
    }

    const int64_t k_;
    std::vector<Candidate> buffer_;
    int64_t count_ = 0;
    int32_t threshold_ = 0;
};

// log(sum(exp(row))): float32 exponentials, float64 sums in 16 lanes in the order of the row.
float log_sum_exp(const float* row, int64_t size) {
    __m512 maximum = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __mmask16 is_nan = 0;
    for (int64_t i = 0; i < size; i += kLanes) {
        const __mmask16 exists = lane_mask(size - i);
        const __m512 values = load(row + i, exists);
        is_nan = __mmask16(is_nan | _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q));
        maximum = _mm512_mask_max_ps(maximum, exists, maximum, values);
    }
    if (is_nan) return std::numeric_limits<float>::quiet_NaN();
    const float top = _mm512_reduce_max_ps(maximum);
    if (std::isinf(top)) return top;
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

}  // extern "C"
