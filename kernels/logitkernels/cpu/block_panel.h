// A panel of blocks whose scales, and for many rows whose integers too, are unpacked.
#pragma once

#include "block_products.h"

namespace logitkernels {

// Layout of the panels of a linear layer. Formats differ here only in what unpacks their scales.
struct PanelLayout {
    int64_t blocks, bytes, integers_begin;
    bool has_minimum;
    void (*unpack_scales)(const char* panel, int64_t blocks, float* scales, float* minima);
};

// Unpacks the scales and minima of a panel to float32 [2][parts of a row][16].
template <class Scales>
void unpack_scales(const char* panel, int64_t blocks, float* scales, float* minima) {
    for (int g = 0; g < kVectors; ++g)
        for (int64_t b = 0; b < blocks; ++b)
            for_each_pair<0, Scales::parts>([&]<int H>() __attribute__((always_inline)) {
                _mm512_store_ps(scales, Scales::template scale<H>(panel, blocks, b, g));
                scales += kLanes;
                if constexpr (Scales::has_minimum) {
                    _mm512_store_ps(minima, Scales::template minimum<H>(panel, blocks, b, g));
                    minima += kLanes;
                }
            });
}

template <class Format>
PanelLayout layout_of(int64_t blocks) {
    using Scales = typename Format::Scales;
    return {blocks, Format::panel_bytes(blocks), Format::integers_begin(blocks), Scales::has_minimum, unpack_scales<Scales>};
}

// The scales and minima of the panel that is multiplied.
struct PanelScales {
    PanelScales(const PanelLayout& layout, int64_t parts_of_row)
        : parts(parts_of_row),
          scales(allocate<float>(kVectors * parts * kLanes)),
          minima(allocate<float>(layout.has_minimum ? kVectors * parts * kLanes : 0)),
          has_minimum(layout.has_minimum) {}

    LOGITKERNELS_INLINE __m512 scale(int g, int64_t s) const { return _mm512_load_ps(scales.get() + (g * parts + s) * kLanes); }
    LOGITKERNELS_INLINE __m512 minimum(int g, int64_t s) const {
        return _mm512_load_ps(minima.get() + (g * parts + s) * kLanes);
    }

    const int64_t parts;
    const Buffer<float> scales, minima;
    const bool has_minimum;
};

// Sets the totals of G groups, from `first` on, to the minima times the sums of the parts of the rows.
template <int G, int R, class Element>
LOGITKERNELS_INLINE void begin_totals(const PanelScales& scales, int first, const Inputs<Element>& in,
                                      __m512 (&totals)[G][R]) {
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) totals[g][r] = _mm512_setzero_ps();
    if (!scales.has_minimum) return;
    for (int64_t s = 0; s < in.parts; ++s)
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g) {
            const __m512 m = scales.minimum(first + g, s);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
                totals[g][r] = _mm512_fmadd_ps(_mm512_set1_ps(in.part_sums[r * in.parts + s]), m, totals[g][r]);
        }
}

template <class Product, int R>
LOGITKERNELS_INLINE void add_scaled(const typename Product::Sum (&part)[R], const __m512& d,
                                    const Inputs<typename Product::Element>& in, int64_t b, __m512 (&totals)[R]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
        totals[r] = _mm512_fmadd_ps(Product::scaled(part[r], in, r * in.blocks + b), d, totals[r]);
}

constexpr int kScratchRows = 6;  // by 32 columns: 12 sums of the part and 12 of the row

// The integers of a panel unpacked for many rows.
template <class Product, int kParts>
class ScratchPanel {
  public:
    ScratchPanel(const PanelScales& scales, int64_t blocks)
        : scales_(scales),
          blocks_(blocks),
          integer_bytes_(blocks * kPairs * Product::unpacked_bytes),
          integers_(allocate<char>(kVectors * integer_bytes_)) {}

    // The next panel is fetched while `tiles` tiles are computed, because a burst of fetches would delay the
    // loads behind it.
    template <class Integers>
    void unpack(const Integers& q, const char* panel, const PanelLayout& layout, int64_t tiles) {
        ahead_ = panel + layout.bytes;
        ahead_end_ = ahead_ + layout.bytes;
        lines_a_block_ = ceil_div(ceil_div(layout.bytes, 64), tiles * kVectors * blocks_);
        for (int g = 0; g < kVectors; ++g)
            for (int64_t b = 0; b < blocks_; ++b) {
                const char* source = vector_at(panel + layout.integers_begin, b, g, Integers::integer_bytes);
                char* target = integers_.get() + g * integer_bytes_ + b * kPairs * Product::unpacked_bytes;
                for_each_pair<0, kPairs>([&]<int P>() __attribute__((always_inline)) {
                    Product::template unpack<P>(q, source, target + P * Product::unpacked_bytes);
                });
            }
    }

    // Where the registers do not hold the sums of both groups, multiplies one group at a time.
    template <int R>
    void tile(const Inputs<typename Product::Element>& in, const Target& target) {
        constexpr int G = R * kVectors <= kRegisterSums ? kVectors : 1;
        for (int first = 0; first < kVectors; first += G) multiply<R, G>(first, in, from_vector(target, first));
    }

  private:
    static constexpr int kPartPairs = kPairs / kParts;

    LOGITKERNELS_INLINE void fetch_ahead(int64_t lines) {
        for (; lines > 0 && ahead_ < ahead_end_; --lines, ahead_ += 64) prefetch(ahead_);
    }

    template <int R, int G>
    LOGITKERNELS_INLINE void multiply(int first, const Inputs<typename Product::Element>& in, const Target& target) {
        __m512 totals[G][R];
        begin_totals(scales_, first, in, totals);
        const char* step = integers_.get() + first * integer_bytes_;
        for (int64_t b = 0; b < blocks_; ++b) {
            fetch_ahead(G * lines_a_block_);
            for (int64_t s = b * kParts; s < (b + 1) * kParts; ++s) {
                const auto* x = in.x + s * 2 * kPartPairs;
                typename Product::Sum part[G][R] = {};
                for (int p = 0; p < kPartPairs; ++p, step += Product::unpacked_bytes)
#pragma GCC unroll 2
                    for (int g = 0; g < G; ++g)
                        Product::template add_unpacked<R>(step + g * integer_bytes_, x + 2 * p, in.stride, part[g]);
#pragma GCC unroll 2
                for (int g = 0; g < G; ++g) add_scaled<Product, R>(part[g], scales_.scale(first + g, s), in, b, totals[g]);
            }
        }
        __m512 sums[R][G];
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sums[r][g] = totals[g][r];
        finish(sums, target);
    }

    const PanelScales& scales_;
    const int64_t blocks_, integer_bytes_;
    Buffer<char> integers_;
    const char *ahead_ = nullptr, *ahead_end_ = nullptr;
    int64_t lines_a_block_ = 0;
};

}  // namespace logitkernels
