// Shared by the products of all weight formats: the work of one part, and the target of a tile's sums.
#pragma once

#include <algorithm>
#include <memory>

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

// Rows of activations that stay in the second-level cache, beside a panel, while all panels are read: whole tiles.
inline int64_t rows_per_block(int64_t rows, int64_t row_bytes, int64_t tile_rows) {
    constexpr int64_t cached_bytes = 160 * 1024;
    const int64_t most = std::max(cached_bytes / row_bytes, tile_rows);
    return round_up(ceil_div(rows, ceil_div(rows, most)), tile_rows);
}

// What the product with one part of a linear layer computes; `out` and `bias` begin at its first feature.
struct PartTask {
    const LinearPart& part;
    int64_t k;
    const float* bias;
    const Activations& x;
    int64_t rows;
    float* out;
    int64_t ldo;
    Epilogue epilogue;

    int64_t panels() const { return ceil_div(part.n, kPanelColumns); }
    Target target(int64_t row, int64_t panel) const {
        const int64_t column = panel * kPanelColumns;
        return {out + row * ldo + column, ldo, bias ? bias + column : nullptr, part.n - column, epilogue};
    }
};

// The product with one part, in items that any thread can compute: some rows by one panel each. Every thread has
// such an object of its own, with the memory that it needs.
class PartProduct {
  public:
    PartProduct(const PartTask& task, int64_t row_bytes, int64_t tile_rows = kMaxTileRows)
        : task_(task), panels_(task.panels()), row_block_(rows_per_block(task.rows, row_bytes, tile_rows)) {}
    virtual ~PartProduct() = default;

    int64_t items() const { return ceil_div(task_.rows, row_block_) * panels_; }
    void compute(int64_t item) {
        const int64_t first = item / panels_ * row_block_;
        multiply(item % panels_, first, std::min(row_block_, task_.rows - first));
    }

  protected:
    // Multiplies the rows from `first` on.
    virtual void multiply(int64_t panel, int64_t first, int64_t count) = 0;

    const PartTask task_;
    const int64_t panels_;

  private:
    const int64_t row_block_;
};

}  // namespace logitkernels
