// Shared by the products of all weight formats: the target of a tile's sums.
#pragma once

#include "linear.h"

namespace logitkernels {

constexpr int kVectors = kPanelColumns / kLanes;

// Widen the first (even) and the second (odd) of two bf16 in each lane.
inline __m512 even_of_pairs(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 odd_of_pairs(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000u))));
}

struct Target {
    float* out;
    int64_t stride;
    const float* bias;  // null, or the bias of the panel's first column
    int64_t columns;    // of the panel that exist
    Epilogue epilogue;
};

inline Target target_of(const Linear& linear, int64_t row, int64_t panel, float* out, int64_t ldo, Epilogue epilogue) {
    const int64_t column = panel * kPanelColumns;
    return {out + row * ldo + column, ldo, linear.bias ? linear.bias + column : nullptr, linear.n - column, epilogue};
}

// The part of the target that begins at vector `v` of the panel.
inline Target from_vector(const Target& target, int v) {
    return {target.out + v * kLanes, target.stride, target.bias ? target.bias + v * kLanes : nullptr,
            target.columns - v * kLanes, target.epilogue};
}

template <int R, int V>
LOGITKERNELS_INLINE void finish(const __m512 (&sums)[R][V], const Target& target) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
        const __mmask16 mask = lane_mask(target.columns - v * kLanes);
        const __m512 bias = target.bias ? load(target.bias + v * kLanes, mask) : _mm512_setzero_ps();
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            float* out = target.out + r * target.stride + v * kLanes;
            __m512 result = target.bias ? _mm512_add_ps(sums[r][v], bias) : sums[r][v];
            if (target.epilogue == Epilogue::kAdd) result = _mm512_add_ps(load(out, mask), result);
            store(out, mask, result);
        }
    }
}

// Rows of activations that stay in the second-level cache, beside a panel, while all panels are read.
inline int64_t rows_per_block(int64_t rows, int64_t row_bytes) {
    constexpr int64_t cached_bytes = 160 * 1024;
    const int64_t most = std::max<int64_t>(cached_bytes / row_bytes, kMaxTileRows);
    return round_up(ceil_div(rows, ceil_div(rows, most)), kMaxTileRows);
}

}  // namespace logitkernels
