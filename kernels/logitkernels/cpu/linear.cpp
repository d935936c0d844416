#include "linear.h"

#include <algorithm>

#include "linear_tile.h"
#include "quantized.h"
#include "team.h"
#include "tiles.h"

namespace logitkernels {
namespace {

// A format defines how one step along k of a panel is read. Every format adds to each sum in the order of k,
// one fused multiply-add or dot product at a time, for any number of rows R. This makes rows batch-invariant.
//
//   Element            type of the activations
//   panel_bytes(k)     bytes of a panel
//   steps(k)           steps of a panel; a step is kStepBytes of weights
//   step<R>(...)       adds one step to the R x 2 sums
//   tail<R>(...)       adds the rest when k is not a whole number of steps
//
// Where the registers do not hold a tile's sums for both vectors of a panel, R x 1 sums take the same steps.

// sums[r] += x[r] w
template <int R>
LOGITKERNELS_INLINE void add(const float* x, int64_t stride, __m512 w, __m512 (&sums)[R][1]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[r][0] = _mm512_fmadd_ps(_mm512_set1_ps(x[r * stride]), w, sums[r][0]);
}

#ifdef LOGITKERNELS_AVX512
struct Bf16Dot {
    using Element = bf16;
    static constexpr int64_t kStepBytes = 128;
    static int64_t panel_bytes(int64_t k) { return ceil_div(k, 2) * kStepBytes; }
    static int64_t steps(int64_t k) { return ceil_div(k, 2); }

    template <int R>
    static inline void step(const bf16* x, int64_t stride, int64_t s, const char* weights, __m512 (&sums)[R][kVectors]) {
        __m512bh w0 = (__m512bh)_mm512_load_si512(weights);
        __m512bh w1 = (__m512bh)_mm512_load_si512(weights + 64);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            int32_t pair;
            __builtin_memcpy(&pair, x + r * stride + 2 * s, sizeof pair);
            __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], w0, a);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], w1, a);
        }
    }

    template <int R>
    static inline void tail(const bf16*, int64_t, int64_t, const char*, __m512 (&)[R][kVectors]) {}
};

#endif

struct Bf16Fma {
    using Element = float;
    static constexpr int64_t kStepBytes = 128;
    static int64_t panel_bytes(int64_t k) { return ceil_div(k, 2) * kStepBytes; }
    static int64_t steps(int64_t k) { return k / 2; }

    template <int R>
    static inline void step(const float* x, int64_t stride, int64_t s, const char* weights, __m512 (&sums)[R][kVectors]) {
        __m512i p0 = _mm512_load_si512(weights);
        __m512i p1 = _mm512_load_si512(weights + 64);
        __m512 e0 = even_of_pairs(p0), e1 = even_of_pairs(p1), o0 = odd_of_pairs(p0), o1 = odd_of_pairs(p1);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            __m512 a = _mm512_set1_ps(x[r * stride + 2 * s]);
            sums[r][0] = _mm512_fmadd_ps(a, e0, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(a, e1, sums[r][1]);
            __m512 b = _mm512_set1_ps(x[r * stride + 2 * s + 1]);
            sums[r][0] = _mm512_fmadd_ps(b, o0, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(b, o1, sums[r][1]);
        }
    }

    template <int R>
    static inline void step(const float* x, int64_t stride, int64_t s, const char* weights, __m512 (&sums)[R][1]) {
        add<R>(x + 2 * s, stride, even_of_pairs(_mm512_load_si512(weights)), sums);
        add<R>(x + 2 * s + 1, stride, odd_of_pairs(_mm512_load_si512(reread(weights))), sums);
    }

    template <int R>
    static inline void tail(const float* x, int64_t stride, int64_t k, const char* weights, __m512 (&sums)[R][1]) {
        if (k % 2 != 0) add<R>(x + k - 1, stride, even_of_pairs(_mm512_load_si512(weights)), sums);
    }

    template <int R>
    static inline void tail(const float* x, int64_t stride, int64_t k, const char* weights, __m512 (&sums)[R][kVectors]) {
        if (k % 2 == 0) return;
        __m512 e0 = even_of_pairs(_mm512_load_si512(weights)), e1 = even_of_pairs(_mm512_load_si512(weights + 64));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            __m512 a = _mm512_set1_ps(x[r * stride + k - 1]);
            sums[r][0] = _mm512_fmadd_ps(a, e0, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(a, e1, sums[r][1]);
        }
    }
};

#ifndef LOGITKERNELS_AVX512
using Bf16Dot = Bf16Fma;  // on activations that bf16 represents
#endif

struct Float16 {
    uint16_t bits;
};

LOGITKERNELS_INLINE __m512 load_weights(const char* source, float) { return _mm512_load_ps(source); }
LOGITKERNELS_INLINE __m512 load_weights(const char* source, Float16) { return load_float16(source); }

template <class Weight>
struct WeightFma {
    using Element = float;
    static constexpr int64_t kVectorBytes = kLanes * sizeof(Weight), kStepBytes = kVectors * kVectorBytes;
    static int64_t panel_bytes(int64_t k) { return k * kStepBytes; }
    static int64_t steps(int64_t k) { return k; }

    template <int R>
    static inline void step(const float* x, int64_t stride, int64_t s, const char* weights, __m512 (&sums)[R][kVectors]) {
        __m512 w0 = load_weights(weights, Weight{}), w1 = load_weights(weights + kVectorBytes, Weight{});
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            __m512 a = _mm512_set1_ps(x[r * stride + s]);
            sums[r][0] = _mm512_fmadd_ps(a, w0, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(a, w1, sums[r][1]);
        }
    }

    template <int R>
    static inline void step(const float* x, int64_t stride, int64_t s, const char* weights, __m512 (&sums)[R][1]) {
        add<R>(x + s, stride, load_weights(weights, Weight{}), sums);
    }

    template <int R, int V>
    static inline void tail(const float*, int64_t, int64_t, const char*, __m512 (&)[R][V]) {}
};

// Multiplies R rows by one panel. Meanwhile a share of the next panel is fetched into the second-level cache.
// `ahead` points to the share, and `ahead_lines` is the number of its cache lines fetched with every 8 steps.
template <class Format, int R>
void tile(const typename Format::Element* x, int64_t stride, const char* panel, int64_t k, const char* ahead,
          int64_t ahead_lines, const Target& target) {
    __m512 sums[R][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    int64_t steps = Format::steps(k), s = 0;
    for (; s + 8 <= steps; s += 8) {
        for (int64_t line = 0; line < ahead_lines; ++line, ahead += 64) prefetch(ahead);
        for (int i = 0; i < 8; ++i, panel += Format::kStepBytes) Format::template step<R>(x, stride, s + i, panel, sums);
    }
    for (; s < steps; ++s, panel += Format::kStepBytes) Format::template step<R>(x, stride, s, panel, sums);
    Format::template tail<R>(x, stride, k, panel, sums);
    finish(sums, target);
}

// Computes a tile one vector of columns at a time. Only the first pass fetches ahead.
template <class Format, int R>
void narrow_tile(const typename Format::Element* x, int64_t stride, const char* panel, int64_t k, const char* ahead,
                 int64_t ahead_lines, const Target& target) {
    for (int v = 0; v < kVectors; ++v, ahead_lines = 0) {
        const char* weights = panel + v * Format::kStepBytes / kVectors;
        __m512 sums[R][1];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sums[r][0] = _mm512_setzero_ps();
        int64_t steps = Format::steps(k), s = 0;
        for (; s + 8 <= steps; s += 8) {
            for (int64_t line = 0; line < ahead_lines; ++line, ahead += 64) prefetch(ahead);
            for (int i = 0; i < 8; ++i, weights += Format::kStepBytes) Format::step(x, stride, s + i, weights, sums);
        }
        for (; s < steps; ++s, weights += Format::kStepBytes) Format::step(x, stride, s, weights, sums);
        Format::tail(x, stride, k, weights, sums);
        finish(sums, from_vector(target, v));
    }
}

template <class Format, int R>
LOGITKERNELS_INLINE void tile_rows(const typename Format::Element* x, int64_t stride, const char* panel, int64_t k,
                                   const char* ahead, int64_t lines, const Target& target) {
    constexpr int rows = R < kMaxTileRows ? R : int(kMaxTileRows);
    if constexpr (rows * kVectors <= kRegisterSums)
        tile<Format, rows>(x, stride, panel, k, ahead, lines, target);
    else
        narrow_tile<Format, rows>(x, stride, panel, k, ahead, lines, target);
}

template <class Format>
void tile_of(int64_t rows, const typename Format::Element* x, int64_t stride, const char* panel, int64_t k,
             const char* ahead, int64_t lines, const Target& target) {
    switch (rows) {
        case 1: return tile_rows<Format, 1>(x, stride, panel, k, ahead, lines, target);
        case 2: return tile_rows<Format, 2>(x, stride, panel, k, ahead, lines, target);
        case 3: return tile_rows<Format, 3>(x, stride, panel, k, ahead, lines, target);
        case 4: return tile_rows<Format, 4>(x, stride, panel, k, ahead, lines, target);
        case 5: return tile_rows<Format, 5>(x, stride, panel, k, ahead, lines, target);
        case 6: return tile_rows<Format, 6>(x, stride, panel, k, ahead, lines, target);
        case 7: return tile_rows<Format, 7>(x, stride, panel, k, ahead, lines, target);
        case 8: return tile_rows<Format, 8>(x, stride, panel, k, ahead, lines, target);
        case 9: return tile_rows<Format, 9>(x, stride, panel, k, ahead, lines, target);
        case 10: return tile_rows<Format, 10>(x, stride, panel, k, ahead, lines, target);
        case 11: return tile_rows<Format, 11>(x, stride, panel, k, ahead, lines, target);
        default: return tile_rows<Format, 12>(x, stride, panel, k, ahead, lines, target);
    }
}

template <class Format>
void multiply_panels(const Linear& linear, const Activations& x, int64_t rows, float* out, int64_t ldo,
                     Epilogue epilogue) {
    using Element = typename Format::Element;
    const int64_t k = linear.k, panels = ceil_div(linear.n, kPanelColumns), panel_bytes = Format::panel_bytes(k);
    const int64_t block = rows_per_block(rows, x.stride * int64_t(sizeof(Element)));
    const int64_t blocks = ceil_div(rows, block);
    share(blocks * panels, [&](int64_t item) {
        const int64_t first = item / panels * block, panel = item % panels;
        const int64_t count = std::min(block, rows - first);
        const char* weights = static_cast<const char*>(linear.weights) + panel * panel_bytes;
        // Tiles are balanced: 13 rows are 7 and 6, not 12 and a lone one.
        const int64_t tiles = ceil_div(count, kMaxTileRows), small = count / tiles, larger = count % tiles;
        const bool last = panel + 1 == panels;
        const int64_t lines = last ? 0 : ceil_div(8 * Format::kStepBytes / 64, tiles);
        const int64_t share = lines * (Format::steps(k) / 8) * 64;
        int64_t row = first;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t size = small + (t < larger);
            const char* ahead = weights + panel_bytes + t * share;
            const Target target = target_of(linear, row, panel, out, ldo, epilogue);
            tile_of<Format>(size, static_cast<const Element*>(x.data) + row * x.stride, x.stride, weights, k, ahead,
                            t * share < panel_bytes ? lines : 0, target);
            row += size;
        }
    });
}

#ifdef LOGITKERNELS_AVX512
constexpr int64_t kTileDepth = 32;  // steps along k of a multiplication of tiles
constexpr int64_t kMostRows = 2 * kTileRows;

struct Bf16TileSums {
    alignas(64) float sums[kVectors][kMostRows][kLanes];
};

// Adds the products of rows of activations, `stride` bytes apart, by kTileDepth steps of a panel.
template <bool kTwoHalves>
LOGITKERNELS_INLINE void add_bf16_tiles(const char* x, int64_t stride, const char* weights) {
    load_tile<kWeights>(weights, 2 * kTileRowBytes);
    load_tile<kWeights + 1>(weights + kTileRowBytes, 2 * kTileRowBytes);
    load_tile<kRows>(x, stride);
    add_bf16_products<kSums, kRows, kWeights>();
    add_bf16_products<kSums + 1, kRows, kWeights + 1>();
    if constexpr (kTwoHalves) {
        load_tile<kRows + 1>(x + kTileRows * stride, stride);
        add_bf16_products<kSums + 2, kRows + 1, kWeights>();
        add_bf16_products<kSums + 3, kRows + 1, kWeights + 1>();
    }
}

// Multiplies up to 32 rows by a panel. Steps past k are zeros in copies of the last rows and weights.
template <bool kTwoHalves>
void bf16_tiles(const bf16* x, int64_t stride, int64_t rows, const char* panel, int64_t k, const char* ahead, int64_t lines,
                Bf16TileSums& result) {
    constexpr int64_t panel_step = kTileDepth * kPanelColumns * sizeof(bf16);
    zero_tile<kSums>();
    zero_tile<kSums + 1>();
    if constexpr (kTwoHalves) {
        zero_tile<kSums + 2>();
        zero_tile<kSums + 3>();
    }
    const int64_t whole = k / kTileDepth * kTileDepth;
    for (int64_t i = 0; i < whole; i += kTileDepth, panel += panel_step) {
        for (int64_t line = 0; line < lines; ++line, ahead += 64) prefetch(ahead);
        add_bf16_tiles<kTwoHalves>(reinterpret_cast<const char*>(x + i), stride * int64_t(sizeof(bf16)), panel);
    }
    if (whole < k) {
        alignas(64) bf16 last_rows[kMostRows][kTileDepth] = {};
        alignas(64) char last_weights[panel_step] = {};
        for (int64_t r = 0; r < rows; ++r) std::copy_n(x + r * stride + whole, k - whole, last_rows[r]);
        std::copy_n(panel, ceil_div(k - whole, 2) * Bf16Dot::kStepBytes, last_weights);
        add_bf16_tiles<kTwoHalves>(reinterpret_cast<const char*>(last_rows), sizeof *last_rows, last_weights);
    }
    store_tile<kSums>(result.sums[0], kTileRowBytes);
    store_tile<kSums + 1>(result.sums[1], kTileRowBytes);
    if constexpr (kTwoHalves) {
        store_tile<kSums + 2>(result.sums[0][kTileRows], kTileRowBytes);
        store_tile<kSums + 3>(result.sums[1][kTileRows], kTileRowBytes);
    }
}

// A tile register adds the even and the odd ones of 32 steps apart, and then both to its sums. It does so for any number of
// rows, so a lone row takes this way too.
void multiply_bf16_tiles(const Linear& linear, const Activations& x, int64_t rows, float* out, int64_t ldo,
                         Epilogue epilogue) {
    const int64_t k = linear.k, panels = ceil_div(linear.n, kPanelColumns), panel_bytes = Bf16Dot::panel_bytes(k);
    const int64_t block = round_up(rows_per_block(rows, x.stride * int64_t(sizeof(bf16))), kMostRows);
    share(ceil_div(rows, block) * panels, [&](int64_t item) {
        const int64_t first = item / panels * block, panel = item % panels;
        const int64_t count = std::min(block, rows - first), tiles = ceil_div(count, kMostRows);
        const char* weights = static_cast<const char*>(linear.weights) + panel * panel_bytes;
        const int64_t lines = panel + 1 == panels ? 0 : ceil_div(kTileDepth * kPanelColumns * 2 / 64, tiles);
        Bf16TileSums result;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t row = first + t * kMostRows, size = std::min(kMostRows, first + count - row);
            const TileShapes shapes(size);
            const bf16* source = static_cast<const bf16*>(x.data) + row * x.stride;
            const char* ahead = weights + panel_bytes + t * lines * 64 * (k / kTileDepth);
            if (size > kTileRows)
                bf16_tiles<true>(source, x.stride, size, weights, k, ahead, lines, result);
            else
                bf16_tiles<false>(source, x.stride, size, weights, k, ahead, lines, result);
            const Target target = target_of(linear, row, panel, out, ldo, epilogue);
            for (int64_t r = 0; r < size; ++r) {
                __m512 sums[1][kVectors];
                for (int v = 0; v < kVectors; ++v) sums[0][v] = _mm512_load_ps(result.sums[v][r]);
                Target of_row = target;
                of_row.out += r * target.stride;
                finish(sums, of_row);
            }
        }
    });
}
#endif

template <class Weight>
void pack_panels(const Weight* weight, int64_t stride, int64_t n, int64_t k, Weight* target, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t panel = 0; panel < ceil_div(n, kPanelColumns); ++panel)
        for (int64_t depth = 0; depth < k; ++depth)
            for (int64_t c = 0; c < kPanelColumns; ++c) {
                int64_t column = panel * kPanelColumns + c;
                target[(panel * k + depth) * kPanelColumns + c] = column < n ? weight[column * stride + depth] : Weight(0);
            }
}

}  // namespace

void convert_activations(const float* x, int64_t ldx, int64_t rows, int64_t k, const Activations& target) {
    share(rows, [&](int64_t row) {
        const float* source = x + row * ldx;
        for (int64_t i = 0; i < k; i += kLanes) {
            __mmask16 mask = lane_mask(k - i);
            __m512 values = load(source + i, mask);
            // Whole vectors are written: the row is padded, and after an odd k the zero belongs to the last
            // pair.
            if (target.rounded())
                store(static_cast<Rounded*>(target.data) + row * target.stride + i, 0xffff, values);
            else
                store(static_cast<float*>(target.data) + row * target.stride + i, 0xffff, values);
        }
        finish_columns(target, row, 0, k);
    });
}

void finish_rows(const Activations& x, int64_t rows, int64_t k) {
    if (!has_blocks(x.kind)) return;
    const int64_t parts = ceil_div(k, kColumnsPerItem);
    share(rows * parts, [&](int64_t item) {
        const int64_t first = item % parts * kColumnsPerItem;
        finish_columns(x, item / parts, first, std::min(first + kColumnsPerItem, k));
    });
}

void multiply(const Linear& linear, const Activations& x, int64_t rows, float* out, int64_t ldo, Epilogue epilogue) {
    switch (linear.kind) {
        case kBf16Dot: return multiply_panels<Bf16Dot>(linear, x, rows, out, ldo, epilogue);
#ifdef LOGITKERNELS_AVX512
        case kBf16Tiles: return multiply_bf16_tiles(linear, x, rows, out, ldo, epilogue);
#endif
        case kBf16Fma: return multiply_panels<Bf16Fma>(linear, x, rows, out, ldo, epilogue);
        case kF32Fma: return multiply_panels<WeightFma<float>>(linear, x, rows, out, ldo, epilogue);
        case kF16Fma: return multiply_panels<WeightFma<Float16>>(linear, x, rows, out, ldo, epilogue);
        default: return multiply_quantized(linear, x, rows, out, ldo, epilogue);
    }
}

}  // namespace logitkernels

using namespace logitkernels;

extern "C" {

// How products of bf16 are summed here. Mirrored by linear.py.
enum Bf16Sums : int64_t { kOneByOne = 0, kInPairs = 1, kInTiles = 2 };

int64_t logitkernels_bf16_sums() {
#ifdef LOGITKERNELS_AVX512
    return request_tiles() ? kInTiles : kInPairs;
#else
    return kOneByOne;
#endif
}

// Packs weight [n, k], rows `stride` elements apart, into panels. `target` holds ceil(n / 32) panels.
void logitkernels_pack_bf16(const bf16* weight, int64_t stride, int64_t n, int64_t k, bf16* target, int threads) {
    const int64_t pairs = ceil_div(k, 2);
#pragma omp parallel for num_threads(threads)
    for (int64_t panel = 0; panel < ceil_div(n, kPanelColumns); ++panel)
        for (int64_t pair = 0; pair < pairs; ++pair)
            for (int64_t c = 0; c < kPanelColumns; ++c)
                for (int64_t half = 0; half < 2; ++half) {
                    int64_t column = panel * kPanelColumns + c, depth = 2 * pair + half;
                    bool exists = column < n && depth < k;
                    target[((panel * pairs + pair) * kPanelColumns + c) * 2 + half] =
                        exists ? weight[column * stride + depth] : bf16(0);
                }
}

void logitkernels_pack_f32(const float* weight, int64_t stride, int64_t n, int64_t k, float* target, int threads) {
    pack_panels(weight, stride, n, k, target, threads);
}

void logitkernels_pack_f16(const uint16_t* weight, int64_t stride, int64_t n, int64_t k, uint16_t* target, int threads) {
    pack_panels(weight, stride, n, k, target, threads);
}

void logitkernels_linear(const Linear* linear, const float* x, int64_t rows, float* out, int threads) {
    const bool rounds = reads_rounded(linear->kind);
    const int64_t k = linear->k, stride = activation_stride(k);
    Buffer<Rounded> rounded = allocate<Rounded>(rounds ? rows * stride : 0);
    const BlockBuffers buffers(rows, k);
    Activations activations{const_cast<float*>(x), k, linear->kind, buffers.blocks()};
    if (rounds) activations = {rounded.get(), stride, linear->kind, buffers.blocks()};
    in_team(threads, [&] {
        if (rounds)
            convert_activations(x, k, rows, k, activations);
        else
            finish_rows(activations, rows, k);
        multiply(*linear, activations, rows, out, linear->n, Epilogue::kStore);
    });
}

}  // extern "C"
