#include "quantized.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "linear_tile.h"
#include "team.h"

namespace logitkernels {
namespace {

constexpr int64_t kBlock = kSumBlock;
constexpr int64_t kScaleBytes = kLanes * 2;  // the scales, or the minima, of a block in 16 features
constexpr int kFusedRows = 4;     // up to here integers are unpacked where they are used, above into a scratch panel
constexpr int kScratchRows = 6;   // by 32 columns: 12 sums of the block and 12 of the row

// A format unpacks two neighbouring steps of k of 16 features: pair<P>(block) as pairs of what Dot multiplies, bf16 or
// int16, and even<P>, odd<P> as float32, P from 0 to 15.

template <bool kHasMinimum>
struct Nibbles {
    static constexpr bool has_minimum = kHasMinimum;
    static constexpr int64_t block_bytes = kScaleBytes + 256;

    // A nibble's integer: as stored beside a minimum, minus 8 without one.
    static constexpr int offset = kHasMinimum ? 0 : 8;

    template <int P>
    static LOGITKERNELS_INLINE __m512i shifted(const char* block, int bits) {
        const __m512i lanes = _mm512_loadu_si512(block + kScaleBytes + P / 4 * 64);
        return _mm512_srli_epi32(lanes, unsigned(4 * (P % 4) + bits));
    }

#ifdef LOGITKERNELS_AVX512
    // Lookup ignores the bits above a nibble: bf16 tables repeat after 16 entries because the index has 5 bits.
    static LOGITKERNELS_INLINE __m512i bf16_table() {
        const __m512 floats = float_table();
        return (__m512i)_mm512_cvtne2ps_pbh(floats, floats);
    }
    static LOGITKERNELS_INLINE __m512 float_table() {
        const __m512i ids = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(ids, _mm512_set1_epi32(offset)));
    }

    template <int P>
    static LOGITKERNELS_INLINE __m512i pair(const char* block) {
        return _mm512_permutexvar_epi16(shifted<P>(block, 0), bf16_table());
    }
    template <int P>
    static LOGITKERNELS_INLINE __m512 even(const char* block) {
        return _mm512_permutexvar_ps(shifted<P>(block, 0), float_table());
    }
    template <int P>
    static LOGITKERNELS_INLINE __m512 odd(const char* block) {
        return _mm512_permutexvar_ps(shifted<P>(block, 16), float_table());
    }
#else
    template <int P>
    static LOGITKERNELS_INLINE __m512i pair(const char* block) {
        const __m512i lanes = _mm512_loadu_si512(block + kScaleBytes + P / 4 * 64);
        const __m512i shifted = _mm512_srli_epi16(lanes, 4 * (P % 4));
        const __m512i nibbles = P % 4 == 3 ? shifted : _mm512_and_si512(shifted, _mm512_set1_epi16(15));
        return offset == 0 ? nibbles : _mm512_sub_epi16(nibbles, _mm512_set1_epi16(offset));
    }
    static LOGITKERNELS_INLINE __m512 floats(__m512i nibbles) {
        const __m512i integers = _mm512_and_si512(nibbles, _mm512_set1_epi32(15));
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(integers, _mm512_set1_epi32(offset)));
    }
    template <int P>
    static LOGITKERNELS_INLINE __m512 even(const char* block) {
        return floats(shifted<P>(block, 0));
    }
    template <int P>
    static LOGITKERNELS_INLINE __m512 odd(const char* block) {
        return floats(shifted<P>(block, 16));
    }
#endif
};

struct Bytes {
    static constexpr bool has_minimum = false;
    static constexpr int64_t block_bytes = kScaleBytes + 512;

#ifdef LOGITKERNELS_AVX512
    template <int P>
    static LOGITKERNELS_INLINE __m512i pair(const char* block) {
        const char* source = block + kScaleBytes + P * 32;
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + 16));
        return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(high)),
                                            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low)));
    }
#else
    template <int P>
    static LOGITKERNELS_INLINE __m512i pair(const char* block) {
        return load_int8(block + kScaleBytes + P * 32);
    }
#endif
    template <int P>
    static LOGITKERNELS_INLINE __m512i words(const char* block) {
        return load_int16(block + kScaleBytes + P * 32);
    }
    template <int P>
    static LOGITKERNELS_INLINE __m512 even(const char* block) {
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words<P>(block), 24), 24));
    }
    template <int P>
    static LOGITKERNELS_INLINE __m512 odd(const char* block) {
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(words<P>(block), 8));
    }
};

template <class Element>
const Element* block_of(const Activations& x, int64_t place) {
    return static_cast<const Element*>(x.data) + place * kBlock;
}

template <class Element>
float sum_of(const Element* block) {
    return _mm512_reduce_add_ps(_mm512_add_ps(load(block, 0xffff), load(block + kLanes, 0xffff)));
}

#ifndef LOGITKERNELS_AVX512
// A block of activations as int16 times a power of two, the least one that holds the largest of them: what is rounded
// away is at most 2^-15 of that. A block with an infinity or NaN is NaN.
void round_block(const float* source, int16_t* integers, float& scale, float& sum) {
    const __m512 low = load(source, 0xffff), high = load(source + kLanes, 0xffff);
    const auto absolute = [](const __m512& v) {
        return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(INT32_MAX)));
    };
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(absolute(low), absolute(high)));
    const bool has_nan = (_mm512_cmp_ps_mask(low, low, _CMP_UNORD_Q) | _mm512_cmp_ps_mask(high, high, _CMP_UNORD_Q)) != 0;
    if (has_nan || std::isinf(largest)) {
        std::fill_n(integers, kBlock, int16_t(0));
        scale = sum = std::numeric_limits<float>::quiet_NaN();
        return;
    }
    // The scale is 2^-15 of the power of two above the largest, and both it and its inverse are normal numbers.
    const int32_t exponent = std::max(std::bit_cast<int32_t>(largest) >> 23, 15);
    scale = std::bit_cast<float>((exponent - 14) << 23);
    const __m512 inverse = _mm512_set1_ps(std::bit_cast<float>((268 - exponent) << 23));
    const auto rounded = [&](const __m512& v) {
        const __m512 nearest = _mm512_roundscale_ps(_mm512_mul_ps(v, inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        return _mm512_min_ps(nearest, _mm512_set1_ps(INT16_MAX));
    };
    const __m512 first = rounded(low), second = rounded(high);
    store_int16(integers, first);
    store_int16(integers + kLanes, second);
    sum = scale * _mm512_reduce_add_ps(_mm512_add_ps(first, second));
}
#endif

// Rows of activations in the type that a product multiplies, from some row on.
template <class Element>
struct Inputs {
    const Element* x;
    int64_t stride;
    int64_t blocks;  // of a row
    const float* block_sums;
    const float* block_scales;  // of integers
};

// How q and x meet. `inputs` is what of the activations is multiplied; a block's sums of 16 features are a Sum, which
// `scaled` turns into float32; a scratch panel holds what two steps of 16 features unpack to.

// Two steps at a time: bf16 and float32 sums with AVX-512, otherwise int16, whose sum over a block is exact in int32.
struct Dot {
    static constexpr int64_t unpacked_bytes = 64;

#ifdef LOGITKERNELS_AVX512
    using Element = bf16;
    using Sum = __m512;

    static Inputs<bf16> inputs(const Activations& x, int64_t k) {
        return {static_cast<const bf16*>(x.data), x.stride, k / kBlock, x.blocks.sums, nullptr};
    }
    static LOGITKERNELS_INLINE __m512 sum(__m512 before, __m512i pairs, int32_t x) {
        return _mm512_dpbf16_ps(before, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(x));
    }
    static LOGITKERNELS_INLINE __m512 scaled(__m512 sum, const Inputs<bf16>&, int64_t) { return sum; }
#else
    using Element = int16_t;
    using Sum = __m512i;

    static Inputs<int16_t> inputs(const Activations& x, int64_t k) {
        return {x.blocks.integers, k, k / kBlock, x.blocks.sums, x.blocks.scales};
    }
    static LOGITKERNELS_INLINE __m512i sum(__m512i before, __m512i pairs, int32_t x) {
        return _mm512_dpwssd_epi32(before, pairs, _mm512_set1_epi32(x));
    }
    static LOGITKERNELS_INLINE __m512 scaled(__m512i sum, const Inputs<int16_t>& in, int64_t block) {
        return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(in.block_scales[block]));
    }
#endif

    template <class Format, int P>
    static LOGITKERNELS_INLINE void unpack(const char* block, char* scratch) {
        _mm512_store_si512(scratch, Format::template pair<P>(block));
    }
    template <class Format, int P, int R>
    static LOGITKERNELS_INLINE void add_packed(const char* block, const Element* x, int64_t stride, Sum (&sums)[R]) {
        add<R>(Format::template pair<P>(block), x, stride, sums);
    }
    template <int R>
    static LOGITKERNELS_INLINE void add_unpacked(const char* scratch, const Element* x, int64_t stride, Sum (&sums)[R]) {
        add<R>(_mm512_load_si512(scratch), x, stride, sums);
    }
    template <int R>
    static LOGITKERNELS_INLINE void add(__m512i pairs, const Element* x, int64_t stride, Sum (&sums)[R]) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            int32_t pair;
            __builtin_memcpy(&pair, x + r * stride, sizeof pair);
            sums[r] = sum(sums[r], pairs, pair);
        }
    }
};

// One step at a time, in float32.
struct Fma {
    static constexpr int64_t unpacked_bytes = 128;
    using Element = float;
    using Sum = __m512;

    static Inputs<float> inputs(const Activations& x, int64_t k) {
        return {static_cast<const float*>(x.data), x.stride, k / kBlock, x.blocks.sums, nullptr};
    }
    static LOGITKERNELS_INLINE __m512 scaled(__m512 sum, const Inputs<float>&, int64_t) { return sum; }

    template <class Format, int P>
    static LOGITKERNELS_INLINE void unpack(const char* block, char* scratch) {
        _mm512_store_ps(scratch, Format::template even<P>(block));
        _mm512_store_ps(scratch + 64, Format::template odd<P>(block));
    }
    template <class Format, int P, int R>
    static LOGITKERNELS_INLINE void add_packed(const char* block, const float* x, int64_t stride, __m512 (&sums)[R]) {
        const __m512 even = Format::template even<P>(block), odd = Format::template odd<P>(block);
        add<R>(even, x, stride, sums);
        add<R>(odd, x + 1, stride, sums);
    }
    // With one of the steps in registers at a time.
    template <int R>
    static LOGITKERNELS_INLINE void add_unpacked(const char* scratch, const float* x, int64_t stride, __m512 (&sums)[R]) {
        add<R>(_mm512_load_ps(scratch), x, stride, sums);
        add<R>(_mm512_load_ps(scratch + 64), x + 1, stride, sums);
    }
    template <int R>
    static LOGITKERNELS_INLINE void add(__m512 q, const float* x, int64_t stride, __m512 (&sums)[R]) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r] = _mm512_fmadd_ps(_mm512_set1_ps(x[r * stride]), q, sums[r]);
    }
};

template <class Step>
LOGITKERNELS_INLINE void for_each_pair(Step step) {
    [&]<int... P>(std::integer_sequence<int, P...>) __attribute__((always_inline)) {
        (step.template operator()<P>(), ...);
    }(std::make_integer_sequence<int, kBlock / 2>());
}

template <class Format>
int64_t minima_bytes(int64_t blocks) {
    return Format::has_minimum ? blocks * kScaleBytes : 0;
}

template <class Format>
int64_t group_bytes(int64_t blocks) {
    return minima_bytes<Format>(blocks) + blocks * Format::block_bytes;
}

template <class Element>
Inputs<Element> from_row(Inputs<Element> in, int64_t row) {
    in.x += row * in.stride;
    in.block_sums += row * in.blocks;
    if (in.block_scales != nullptr) in.block_scales += row * in.blocks;
    return in;
}

template <int R, class Element>
LOGITKERNELS_INLINE void add_minimum(__m512 m, const Inputs<Element>& in, int64_t b, __m512 (&totals)[R]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
        totals[r] = _mm512_fmadd_ps(_mm512_set1_ps(in.block_sums[r * in.blocks + b]), m, totals[r]);
}

template <class Product, int R>
LOGITKERNELS_INLINE void add_block(const typename Product::Sum (&block)[R], __m512 d,
                                   const Inputs<typename Product::Element>& in, int64_t b, __m512 (&totals)[R]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
        totals[r] = _mm512_fmadd_ps(Product::scaled(block[r], in, r * in.blocks + b), d, totals[r]);
}

// Groups of 16 features whose sums a tile of R rows takes in one go. On AVX2 the sums of one group of a lone row are too
// few to hide the latency of a multiply-add; with AVX-512 both ways have not been compared.
template <int R>
constexpr int groups_together() {
    return kRegisterSums == 6 && R == 1 ? kVectors : 1;
}

template <class Format, class Product, int R>
void fused_tile(const char* panel, const Inputs<typename Product::Element>& in, const Target& target) {
    constexpr int G = groups_together<R>();
    const int64_t bytes = group_bytes<Format>(in.blocks);
    __m512 sums[R][kVectors];
#pragma GCC unroll 2
    for (int first = 0; first < kVectors; first += G) {
        const char* group = panel + first * bytes;
        __m512 totals[G][R];
        for (int g = 0; g < G; ++g)
            for (int r = 0; r < R; ++r) totals[g][r] = _mm512_setzero_ps();
        if constexpr (Format::has_minimum)
            for (int64_t b = 0; b < in.blocks; ++b)
#pragma GCC unroll 2
                for (int g = 0; g < G; ++g) {
                    const char* minima = group + g * bytes + b * kScaleBytes;
                    if (b % 2 == 0) prefetch(minima + kVectors * bytes);
                    add_minimum<R>(load_float16(minima), in, b, totals[g]);
                }
        const char* block = group + minima_bytes<Format>(in.blocks);
        for (int64_t b = 0; b < in.blocks; ++b, block += Format::block_bytes) {
            for (int g = 0; g < G; ++g)
                for (int64_t line = 0; line < Format::block_bytes; line += 64)
                    prefetch(block + (kVectors + g) * bytes + line);
            const auto* x = in.x + b * kBlock;
            typename Product::Sum partial[G][R] = {};
            for_each_pair([&]<int P>() __attribute__((always_inline)) {
#pragma GCC unroll 2
                for (int g = 0; g < G; ++g)
                    Product::template add_packed<Format, P, R>(block + g * bytes, x + 2 * P, in.stride, partial[g]);
            });
#pragma GCC unroll 2
            for (int g = 0; g < G; ++g)
                add_block<Product, R>(partial[g], load_float16(block + g * bytes), in, b, totals[g]);
        }
        for (int g = 0; g < G; ++g)
            for (int r = 0; r < R; ++r) sums[r][first + g] = totals[g][r];
    }
    finish(sums, target);
}

// A panel unpacked for many rows: per group its integers, and its scales and minima as float32.
template <class Format, class Product>
class ScratchPanel {
  public:
    explicit ScratchPanel(int64_t blocks)
        : blocks_(blocks),
          integer_bytes_(blocks * kBlock / 2 * Product::unpacked_bytes),
          integers_(allocate<char>(kVectors * integer_bytes_)),
          scales_(allocate<float>(kVectors * blocks * kLanes)),
          minima_(allocate<float>(kVectors * blocks * kLanes)) {}

    // The panel after it is fetched while `tiles` tiles are computed: a burst of fetches would make the loads behind it wait.
    void unpack(const char* panel, int64_t tiles) {
        const int64_t bytes = group_bytes<Format>(blocks_);
        ahead_ = panel + kVectors * bytes;
        ahead_end_ = ahead_ + kVectors * bytes;
        lines_a_block_ = ceil_div(ceil_div(kVectors * bytes, 64), tiles * kVectors * blocks_);
        for (int g = 0; g < kVectors; ++g) {
            const char* group = panel + g * bytes;
            for (int64_t b = 0; b < blocks_; ++b) {
                const char* block = group + minima_bytes<Format>(blocks_) + b * Format::block_bytes;
                char* target = integers_.get() + g * integer_bytes_ + b * kBlock / 2 * Product::unpacked_bytes;
                for_each_pair([&]<int P>() __attribute__((always_inline)) {
                    Product::template unpack<Format, P>(block, target + P * Product::unpacked_bytes);
                });
                const int64_t place = (g * blocks_ + b) * kLanes;
                _mm512_store_ps(scales_.get() + place, load_float16(block));
                if constexpr (Format::has_minimum)
                    _mm512_store_ps(minima_.get() + place, load_float16(group + b * kScaleBytes));
            }
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
            add_block<Product, R>(block0, _mm512_load_ps(scales_.get() + b * kLanes), in, b, totals0);
            add_block<Product, R>(block1, _mm512_load_ps(scales_.get() + (blocks_ + b) * kLanes), in, b, totals1);
        }
        __m512 sums[R][kVectors];
        for (int r = 0; r < R; ++r) sums[r][0] = totals0[r], sums[r][1] = totals1[r];
        finish(sums, target);
    }

    // The same for the columns of one group at a time, where the registers do not hold the sums of both.
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
                add_block<Product, R>(block, _mm512_load_ps(scales + b * kLanes), in, b, totals);
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

template <class Format, class Product>
void multiply_format(const Linear& linear, const Activations& x, int64_t rows, float* out, int64_t ldo,
                     Epilogue epilogue) {
    const auto all = Product::inputs(x, linear.k);
    const int64_t blocks = all.blocks, panels = ceil_div(linear.n, kPanelColumns);
    const int64_t panel_bytes = kVectors * group_bytes<Format>(blocks);
    const int64_t row_block = rows_per_block(rows, all.stride * int64_t(sizeof *all.x));
    ScratchPanel<Format, Product> scratch(rows > kFusedRows ? blocks : 0);
    share(ceil_div(rows, row_block) * panels, [&](int64_t item) {
        const int64_t first = item / panels * row_block, panel = item % panels;
        const int64_t count = std::min(row_block, rows - first);
        const char* weights = static_cast<const char*>(linear.weights) + panel * panel_bytes;
        const int64_t most = count <= kFusedRows ? kFusedRows : kScratchRows;
        const int64_t tiles = ceil_div(count, most), small = count / tiles, larger = count % tiles;
        if (count > kFusedRows) scratch.unpack(weights, tiles);
        for (int64_t t = 0, row = first; t < tiles; ++t) {
            const int64_t size = small + (t < larger);
            const auto in = from_row(all, row);
            const Target target = target_of(linear, row, panel, out, ldo, epilogue);
            row += size;
            if (count <= kFusedRows) {
                switch (size) {
                    case 1: fused_tile<Format, Product, 1>(weights, in, target); break;
                    case 2: fused_tile<Format, Product, 2>(weights, in, target); break;
                    case 3: fused_tile<Format, Product, 3>(weights, in, target); break;
                    default: fused_tile<Format, Product, 4>(weights, in, target); break;
                }
                continue;
            }
            switch (size) {
                case 1: scratch.template tile<1>(in, target); break;
                case 2: scratch.template tile<2>(in, target); break;
                case 3: scratch.template tile<3>(in, target); break;
                case 4: scratch.template tile<4>(in, target); break;
                case 5: scratch.template tile<5>(in, target); break;
                default: scratch.template tile<6>(in, target); break;
            }
        }
    });
}

}  // namespace

void finish_columns(const Activations& x, int64_t row, int64_t first, int64_t last) {
    if (!reads_blocks(x.kind)) return;
    for (int64_t b = first / kBlock; b < last / kBlock; ++b) {
        const int64_t place = row * x.stride / kBlock + b;
        if (x.kind == kQ41Fma) {
            x.blocks.sums[place] = sum_of(block_of<float>(x, place));
            continue;
        }
#ifdef LOGITKERNELS_AVX512
        x.blocks.sums[place] = sum_of(block_of<Rounded>(x, place));
#else
        round_block(block_of<float>(x, place), x.blocks.integers + place * kBlock, x.blocks.scales[place],
                    x.blocks.sums[place]);
#endif
    }
}

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

// Blocks as a GGUF file holds them, row after row of the weight [n, k], into panels. `kind` is one of the dot kinds;
// `target` is zeroed and holds ceil(n / 32) panels. In the file a Q4 block is d, (m,) and 16 bytes whose lower nibbles
// are steps 0 to 15 and whose upper ones are steps 16 to 31; a Q8_0 block is d and 32 int8.
extern "C" void logitkernels_pack_gguf(const uint8_t* raw, int64_t kind, int64_t n, int64_t k, uint8_t* target,
                                       int threads) {
    const bool is_bytes = kind == kQ80Dot, has_minimum = kind == kQ41Dot;
    const int64_t header = has_minimum ? 4 : 2, source_bytes = header + (is_bytes ? 32 : 16);
    const int64_t blocks = k / kBlock, block_bytes = kScaleBytes + (is_bytes ? 512 : 256);
    const int64_t minima = has_minimum ? blocks * kScaleBytes : 0;
#pragma omp parallel for num_threads(threads)
    for (int64_t column = 0; column < n; ++column)
        for (int64_t b = 0; b < blocks; ++b) {
            const uint8_t* source = raw + (column * blocks + b) * source_bytes;
            uint8_t* group = target + column / kLanes * (minima + blocks * block_bytes);
            uint8_t* block = group + minima + b * block_bytes;
            const int64_t lane = column % kLanes;
            std::memcpy(block + lane * 2, source, 2);
            if (has_minimum) std::memcpy(group + b * kScaleBytes + lane * 2, source + 2, 2);
            uint8_t* integers = block + kScaleBytes;
            for (int64_t step = 0; step < kBlock; ++step) {
                if (is_bytes) {
                    integers[step / 2 * 32 + lane * 2 + step % 2] = source[header + step];
                    continue;
                }
                const uint8_t byte = source[header + step % 16];
                const uint32_t nibble = step < 16 ? byte & 15 : byte >> 4;
                uint8_t* vector = integers + step / 8 * 64 + lane * 4;
                uint32_t lanes;
                std::memcpy(&lanes, vector, sizeof lanes);
                lanes |= nibble << (step % 2 * 16 + step % 8 / 2 * 4);
                std::memcpy(vector, &lanes, sizeof lanes);
            }
        }
}
