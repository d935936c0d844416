#include "quantized.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "block_formats.h"
#include "block_products.h"
#include "team.h"

namespace logitkernels {
namespace {

constexpr int kScratchRows = 6;  // by 32 columns: 12 sums of the block and 12 of the row

template <int R, class Element>
LOGITKERNELS_INLINE void add_minimum(__m512 m, const Inputs<Element>& in, int64_t b, __m512 (&totals)[R]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
        totals[r] = _mm512_fmadd_ps(_mm512_set1_ps(in.block_sums[r * in.blocks + b]), m, totals[r]);
}

template <class Product, int R>
LOGITKERNELS_INLINE void add_scaled(const typename Product::Sum (&block)[R], __m512 d,
                                    const Inputs<typename Product::Element>& in, int64_t b, __m512 (&totals)[R]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
        totals[r] = _mm512_fmadd_ps(Product::scaled(block[r], in, r * in.blocks + b), d, totals[r]);
}

// Computes a tile and meanwhile fetches blocks of the next panel: every `turns`th, from `turn` on.
template <class Format, class Product, int R>
void fused_tile(const char* panel, const Inputs<typename Product::Element>& in, int64_t turn, int64_t turns,
                const Target& target) {
    constexpr int G = Product::template groups_together<R>;
    const int64_t next = panel_bytes<Format>(in.blocks);
    const bool once = turns == 1 && next <= kFirstLevelBytes;  // for the only tile that will read it
    __m512 sums[R][kVectors];
#pragma GCC unroll 2
    for (int first = 0; first < kVectors; first += G) {
        __m512 totals[G][R];
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) totals[g][r] = _mm512_setzero_ps();
        if constexpr (Format::has_minimum)
            for (int64_t b = 0; b < in.blocks; ++b) {
                const char* minima = minima_at(panel, b, first);
                if (turn == 0 && first == 0) prefetch(minima + next);
#pragma GCC unroll 2
                for (int g = 0; g < G; ++g) add_minimum<R>(load_float16(minima + g * kScaleBytes), in, b, totals[g]);
            }
        const char* block = panel + minima_bytes<Format>(in.blocks);
        for (int64_t b = 0, fetched = turn; b < in.blocks; ++b, block += block_bytes<Format>) {
            if (b == fetched && first == 0) {
                fetched += turns;
                for (int64_t line = 0; line < block_bytes<Format>; line += 64)
                    once ? prefetch_once(block + next + line) : prefetch(block + next + line);
            }
            typename Product::Sum partial[G][R] = {};
            Product::template add_block<Format>(integers_at<Format>(block, first), in, b, partial);
#pragma GCC unroll 2
            for (int g = 0; g < G; ++g)
                add_scaled<Product, R>(partial[g], load_float16(block + (first + g) * kScaleBytes), in, b, totals[g]);
        }
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sums[r][first + g] = totals[g][r];
    }
    finish(sums, target);
}

// A panel unpacked for many rows: for each group its integers, and its scales and minima as float32.
template <class Format, class Product>
class ScratchPanel {
  public:
    explicit ScratchPanel(int64_t blocks)
        : blocks_(blocks),
          integer_bytes_(blocks * kBlock / 2 * Product::unpacked_bytes),
          integers_(allocate<char>(kVectors * integer_bytes_)),
          scales_(allocate<float>(kVectors * blocks * kLanes)),
          minima_(allocate<float>(kVectors * blocks * kLanes)) {}

    // The next panel is fetched while `tiles` tiles are computed, because a burst of fetches would delay the
    // loads behind it.
    void unpack(const char* panel, int64_t tiles) {
        const int64_t bytes = panel_bytes<Format>(blocks_);
        ahead_ = panel + bytes;
        ahead_end_ = ahead_ + bytes;
        lines_a_block_ = ceil_div(ceil_div(bytes, 64), tiles * kVectors * blocks_);
        for (int g = 0; g < kVectors; ++g)
            for (int64_t b = 0; b < blocks_; ++b) {
                const char* block = panel + minima_bytes<Format>(blocks_) + b * block_bytes<Format>;
                char* target = integers_.get() + g * integer_bytes_ + b * kBlock / 2 * Product::unpacked_bytes;
                for_each_pair([&]<int P>() __attribute__((always_inline)) {
                    Product::template unpack<Format, P>(integers_at<Format>(block, g), target + P * Product::unpacked_bytes);
                });
                const int64_t place = (g * blocks_ + b) * kLanes;
                _mm512_store_ps(scales_.get() + place, load_float16(block + g * kScaleBytes));
                if constexpr (Format::has_minimum)
                    _mm512_store_ps(minima_.get() + place, load_float16(minima_at(panel, b, g)));
            }
    }

    template <int R>
    LOGITKERNELS_INLINE void tile(const Inputs<typename Product::Element>& in, const Target& target) {
        if constexpr (R * kVectors <= kRegisterSums)
            multiply<R>(in, target);
        else
            multiply_by_group<R>(in, target);
    }

  private:
    LOGITKERNELS_INLINE void fetch_ahead(int64_t lines) {
        for (; lines > 0 && ahead_ < ahead_end_; --lines, ahead_ += 64) prefetch(ahead_);
    }

    template <int R>
    void multiply(const Inputs<typename Product::Element>& in, const Target& target) {
        __m512 totals0[R], totals1[R];
        for (int r = 0; r < R; ++r) totals0[r] = totals1[r] = _mm512_setzero_ps();
        if constexpr (Format::has_minimum)
            for (int64_t b = 0; b < blocks_; ++b) {
                add_minimum<R>(_mm512_load_ps(minima_.get() + b * kLanes), in, b, totals0);
                add_minimum<R>(_mm512_load_ps(minima_.get() + (blocks_ + b) * kLanes), in, b, totals1);
            }
        for (int64_t b = 0; b < blocks_; ++b) {
            fetch_ahead(kVectors * lines_a_block_);
            const char* integers = integers_.get() + b * kBlock / 2 * Product::unpacked_bytes;
            const auto* x = in.x + b * kBlock;
            typename Product::Sum block0[R] = {}, block1[R] = {};
            for (int p = 0; p < kBlock / 2; ++p) {
                const char* step = integers + p * Product::unpacked_bytes;
                Product::template add_unpacked<R>(step, x + 2 * p, in.stride, block0);
                Product::template add_unpacked<R>(step + integer_bytes_, x + 2 * p, in.stride, block1);
            }
            add_scaled<Product, R>(block0, _mm512_load_ps(scales_.get() + b * kLanes), in, b, totals0);
            add_scaled<Product, R>(block1, _mm512_load_ps(scales_.get() + (blocks_ + b) * kLanes), in, b, totals1);
        }
        __m512 sums[R][kVectors];
        for (int r = 0; r < R; ++r) sums[r][0] = totals0[r], sums[r][1] = totals1[r];
        finish(sums, target);
    }

    // Multiplies the columns of one group at a time, where the registers do not hold the sums of both.
    template <int R>
    void multiply_by_group(const Inputs<typename Product::Element>& in, const Target& target) {
        for (int g = 0; g < kVectors; ++g) {
            const float *scales = scales_.get() + g * blocks_ * kLanes, *minima = minima_.get() + g * blocks_ * kLanes;
            __m512 totals[R];
            for (int r = 0; r < R; ++r) totals[r] = _mm512_setzero_ps();
            if constexpr (Format::has_minimum)
                for (int64_t b = 0; b < blocks_; ++b)
                    add_minimum<R>(_mm512_load_ps(minima + b * kLanes), in, b, totals);
            const char* step = integers_.get() + g * integer_bytes_;
            for (int64_t b = 0; b < blocks_; ++b) {
                fetch_ahead(lines_a_block_);
                const auto* x = in.x + b * kBlock;
                typename Product::Sum block[R] = {};
                for (int p = 0; p < kBlock / 2; ++p, step += Product::unpacked_bytes)
                    Product::template add_unpacked<R>(step, x + 2 * p, in.stride, block);
                add_scaled<Product, R>(block, _mm512_load_ps(scales + b * kLanes), in, b, totals);
            }
            __m512 sums[R][1];
            for (int r = 0; r < R; ++r) sums[r][0] = totals[r];
            finish(sums, from_vector(target, g));
        }
    }

    const int64_t blocks_, integer_bytes_;
    Buffer<char> integers_;
    Buffer<float> scales_, minima_;
    const char *ahead_ = nullptr, *ahead_end_ = nullptr;
    int64_t lines_a_block_ = 0;
};

// In the file a Q4 block is d, (m,) and 16 bytes. Their lower nibbles are steps 0 to 15, their upper nibbles
// steps 16 to 31. A Q8_0 block is d and 32 int8.
template <class Format>
void pack_format(const uint8_t* raw, int64_t n, int64_t blocks, char* target, int threads) {
    constexpr bool is_bytes = std::is_same_v<Format, Bytes>;
    constexpr int64_t header = Format::has_minimum ? 4 : 2, source_bytes = header + (is_bytes ? 32 : 16);
#pragma omp parallel for num_threads(threads)
    for (int64_t column = 0; column < n; ++column)
        for (int64_t b = 0; b < blocks; ++b) {
            const uint8_t* source = raw + (column * blocks + b) * source_bytes;
            const int64_t group = column / kLanes % kVectors, lane = column % kLanes;
            char* panel = target + column / kPanelColumns * panel_bytes<Format>(blocks);
            char* block = panel + minima_bytes<Format>(blocks) + b * block_bytes<Format>;
            std::memcpy(block + group * kScaleBytes + lane * 2, source, 2);
            if constexpr (Format::has_minimum) std::memcpy(minima_at(panel, b, group) + lane * 2, source + 2, 2);
            char* integers = integers_at<Format>(block, group);
            for (int64_t step = 0; step < kBlock; ++step) {
                if constexpr (is_bytes) {
                    integers[step / 2 * 32 + lane * 2 + step % 2] = char(source[header + step]);
                } else {
                    const uint8_t byte = source[header + step % 16];
                    const uint32_t nibble = step < 16 ? byte & 15 : byte >> 4;
                    char* vector = integers + step / 8 * 64 + lane * 4;
                    uint32_t lanes;
                    std::memcpy(&lanes, vector, sizeof lanes);
                    lanes |= nibble << (step % 2 * 16 + step % 8 / 2 * 4);
                    std::memcpy(vector, &lanes, sizeof lanes);
                }
            }
        }
}

// Calls tile<R>() for R = rows, at most Most.
template <int Most, class Tile>
LOGITKERNELS_INLINE void tile_of(int64_t rows, const Tile& tile) {
    if constexpr (Most > 1)
        if (rows < Most) return tile_of<Most - 1>(rows, tile);
    tile.template operator()<Most>();
}

template <class Format, class Product>
void multiply_format(const Linear& linear, const Activations& x, int64_t rows, float* out, int64_t ldo,
                     Epilogue epilogue) {
    const auto all = Product::inputs(x, linear.k);
    const int64_t blocks = all.blocks, panels = ceil_div(linear.n, kPanelColumns);
    const int64_t bytes = panel_bytes<Format>(blocks);
    const int64_t row_block = rows_per_block(rows, all.stride * int64_t(sizeof *all.x));
    // Calls tile(turn, turns, row, size) for each tile of the rows from `first` on, in sizes as equal as
    // possible.
    const auto for_tiles = [](int64_t first, int64_t count, int64_t most, const auto& tile) {
        const int64_t tiles = ceil_div(count, most), small = count / tiles, larger = count % tiles;
        for (int64_t t = 0, row = first; t < tiles; ++t) {
            const int64_t size = small + (t < larger);
            tile(t, tiles, row, size);
            row += size;
        }
    };
    const auto fused = [&](const char* weights, int64_t panel, int64_t first, int64_t count) {
        for_tiles(first, count, Product::fused_rows, [&](int64_t turn, int64_t turns, int64_t row, int64_t size) {
            tile_of<Product::fused_rows>(size, [&]<int R>() {
                fused_tile<Format, Product, R>(weights, from_row(all, row), turn, turns,
                                               target_of(linear, row, panel, out, ldo, epilogue));
            });
        });
    };
    const auto for_panels = [&](const auto& multiply) {
        share(ceil_div(rows, row_block) * panels, [&](int64_t item) {
            const int64_t first = item / panels * row_block, panel = item % panels;
            const char* weights = static_cast<const char*>(linear.weights) + panel * bytes;
            multiply(weights, panel, first, std::min(row_block, rows - first));
        });
    };
    if constexpr (!Product::has_scratch) {
        for_panels(fused);
    } else {
        ScratchPanel<Format, Product> scratch(rows > Product::fused_rows ? blocks : 0);
        for_panels([&](const char* weights, int64_t panel, int64_t first, int64_t count) {
            if (count <= Product::fused_rows) return fused(weights, panel, first, count);
            scratch.unpack(weights, ceil_div(count, kScratchRows));
            for_tiles(first, count, kScratchRows, [&](int64_t, int64_t, int64_t row, int64_t size) {
                tile_of<kScratchRows>(size, [&]<int R>() {
                    scratch.template tile<R>(from_row(all, row), target_of(linear, row, panel, out, ldo, epilogue));
                });
            });
        });
    }
}

}  // namespace

void multiply_quantized(const Linear& linear, const Activations& x, int64_t rows, float* out, int64_t ldo,
                        Epilogue epilogue) {
    switch (linear.kind) {
        case kQ40Dot: return multiply_format<Nibbles<false>, Dot>(linear, x, rows, out, ldo, epilogue);
        case kQ40Fma: return multiply_format<Nibbles<false>, Fma>(linear, x, rows, out, ldo, epilogue);
        case kQ41Dot: return multiply_format<Nibbles<true>, Dot>(linear, x, rows, out, ldo, epilogue);
        case kQ41Fma: return multiply_format<Nibbles<true>, Fma>(linear, x, rows, out, ldo, epilogue);
        case kQ80Dot: return multiply_format<Bytes, Dot>(linear, x, rows, out, ldo, epilogue);
        default: return multiply_format<Bytes, Fma>(linear, x, rows, out, ldo, epilogue);
    }
}

}  // namespace logitkernels

using namespace logitkernels;

// Packs blocks in the order of a GGUF file, row after row of the weight [n, k], into panels. `kind` is one of
// the dot kinds; `target` is zeroed and holds ceil(n / 32) panels.
extern "C" void logitkernels_pack_gguf(const uint8_t* raw, int64_t kind, int64_t n, int64_t k, char* target, int threads) {
    switch (kind) {
        case kQ40Dot: return pack_format<Nibbles<false>>(raw, n, k / kBlock, target, threads);
        case kQ41Dot: return pack_format<Nibbles<true>>(raw, n, k / kBlock, target, threads);
        default: return pack_format<Bytes>(raw, n, k / kBlock, target, threads);
    }
}
