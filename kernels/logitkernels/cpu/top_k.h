// Selection of the largest entries of a row, without sorting it.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "vector.h"

namespace logitkernels {

// Integers in the order of the floats, except that both zeros are equal and every NaN is the largest.
inline __m512i order_keys(__m512 values) {
    const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m512i bits = _mm512_castps_si512(_mm512_add_ps(values, _mm512_setzero_ps()));
    const __m512i flips = _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7fffffff));
    return _mm512_mask_mov_epi32(_mm512_xor_si512(bits, flips), is_nan, _mm512_set1_epi32(0x7fffffff));
}

// The largest entry of a row; NaN if the row holds one.
inline float largest_of(const float* row, int64_t size) {
    __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __mmask16 holds_nan = 0;
    for (int64_t i = 0; i < size; i += kLanes) {
        const __mmask16 exists = lane_mask(size - i);
        const __m512 values = load(row + i, exists);
        holds_nan = __mmask16(holds_nan | _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q));
        largest = _mm512_mask_max_ps(largest, exists, largest, values);
    }
    return holds_nan != 0 ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(largest);
}

// An entry of a row; the better one has the larger key or, at the same key, the lower id.
struct Candidate {
    int32_t key;
    int32_t id;
    bool operator<(const Candidate& other) const { return key != other.key ? key > other.key : id < other.id; }
};

// Keeps every entry above a threshold that rises whenever the buffer is full. A row is read once and never
// sorted.
class TopK {
  public:
    explicit TopK(int64_t k) : k_(k), buffer_(size_t(2 * k + 512)) {}

    void select(const float* row, int64_t size, int64_t* ids, float* values) {
        count_ = 0;
        threshold_ = std::numeric_limits<int32_t>::min();
        for (int64_t i = 0; i < size; i += kLanes) {
            const __mmask16 exists = lane_mask(size - i);
            const __m512i keys = order_keys(load(row + i, exists));
            // Strictly above: an equal entry that comes later has a higher id and loses.
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

}  // namespace logitkernels
