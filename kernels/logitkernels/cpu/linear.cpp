#include "linear.h"

#include <algorithm>
#include <memory>
#include <vector>

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
class DenseProduct : public PartProduct {
    using Element = typename Format::Element;

  public:
    explicit DenseProduct(const PartTask& task)
        : PartProduct(task, task.x.stride * int64_t(sizeof(Element))), panel_bytes_(Format::panel_bytes(task.k)) {}

  private:
    void multiply(int64_t panel, int64_t first, int64_t count) override {
        const char* weights = static_cast<const char*>(task_.part.weights) + panel * panel_bytes_;
        // Tiles are balanced: 13 rows are 7 and 6, not 12 and a lone one.
        const int64_t tiles = ceil_div(count, kMaxTileRows), small = count / tiles, larger = count % tiles;
        const bool last = panel + 1 == panels_;
        const int64_t lines = last ? 0 : ceil_div(8 * Format::kStepBytes / 64, tiles);
        const int64_t share = lines * (Format::steps(task_.k) / 8) * 64, stride = task_.x.stride;
        const Element* x = static_cast<const Element*>(task_.x.data);
        int64_t row = first;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t size = small + (t < larger);
            const char* ahead = weights + panel_bytes_ + t * share;
            tile_of<Format>(size, x + row * stride, stride, weights, task_.k, ahead, t * share < panel_bytes_ ? lines : 0,
                            task_.target(row, panel));
            row += size;
        }
    }

    const int64_t panel_bytes_;
};

std::unique_ptr<PartProduct> product_of(const PartTask& task) {
    switch (task.part.kind) {
        case kBf16Dot: return std::make_unique<DenseProduct<Bf16Dot>>(task);
#ifdef LOGITKERNELS_AVX512
        case kBf16Tiles: return std::make_unique<Bf16TileProduct>(task);
#endif
        case kBf16Fma: return std::make_unique<DenseProduct<Bf16Fma>>(task);
        case kF32Fma: return std::make_unique<DenseProduct<WeightFma<float>>>(task);
        case kF16Fma: return std::make_unique<DenseProduct<WeightFma<Float16>>>(task);
        default: return quantized_product(task);
    }
}

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
    if (!x.has_blocks()) return;
    const int64_t parts = ceil_div(k, kColumnsPerItem);
    share(rows * parts, [&](int64_t item) {
        const int64_t first = item % parts * kColumnsPerItem;
        finish_columns(x, item / parts, first, std::min(first + kColumnsPerItem, k));
    });
}

void multiply(const Linear& linear, const Activations& x, int64_t rows, float* out, int64_t ldo, Epilogue epilogue) {
    std::vector<std::unique_ptr<PartProduct>> products;
    int64_t items = 0, column = 0;
    for (int64_t i = 0; i < linear.num_parts; ++i) {
        const LinearPart& part = linear.parts[i];
        const float* bias = linear.bias ? linear.bias + column : nullptr;
        products.push_back(product_of({part, linear.k, bias, x, rows, out + column, ldo, epilogue}));
        items += products.back()->items();
        column += part.n;
    }
    share(items, [&](int64_t item) {
        for (const auto& product : products) {
            if (item < product->items()) return product->compute(item);
            item -= product->items();
        }
    });
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
    const int64_t k = linear->k, stride = activation_stride(k), forms = forms_of(*linear);
    const bool rounds = forms & kRoundedRows;
    Buffer<Rounded> rounded = allocate<Rounded>(rounds ? rows * stride : 0);
    const BlockBuffers buffers(rows, k, forms);
    Activations activations{const_cast<float*>(x), k, forms, buffers.blocks()};
    if (rounds) activations = {rounded.get(), stride, forms, buffers.blocks()};
    in_team(threads, [&] {
        if (rounds)
            convert_activations(x, k, rows, k, activations);
        else
            finish_rows(activations, rows, k);
        multiply(*linear, activations, rows, out, linear->n, Epilogue::kStore);
    });
}

}  // extern "C"
