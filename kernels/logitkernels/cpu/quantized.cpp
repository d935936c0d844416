#include "quantized.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "linear_tile.h"
#include "team.h"

namespace logitkernels {
namespace {

constexpr int64_t kBlock = kSumBlock;
constexpr int64_t kScaleBytes = kLanes * 2;  // the scales, or the minima, of a block in 16 features
constexpr int kScratchRows = 6;  // by 32 columns: 12 sums of the block and 12 of the row

// A format unpacks some steps of k of 16 features of a block:
//
//   quad<Q>(integers)          AVX-512: four steps as unsigned bytes, `offset` above the integers, Q from 0 to 7
//   pair<P>(integers)          elsewhere: two neighbouring steps as int16, P from 0 to 15
//   even<P>, odd<P>(integers)  either of them as float32
//
// Bytes of quads lie as is cheapest to unpack: of 16 activations, the one for byte i is byte_order()[i].

template <bool kHasMinimum>
struct Nibbles {
    static constexpr bool has_minimum = kHasMinimum;
    static constexpr int64_t integer_bytes = 256;  // of a block

    // A nibble's integer: as stored beside a minimum, minus 8 without one.
    static constexpr int offset = kHasMinimum ? 0 : 8;

    template <int P>
    static LOGITKERNELS_INLINE __m512i shifted(const char* integers, int bits) {
        const __m512i lanes = _mm512_loadu_si512(integers + P / 4 * 64);
        return _mm512_srli_epi32(lanes, unsigned(4 * (P % 4) + bits));
    }

#ifdef LOGITKERNELS_AVX512
    static __m128i byte_order() { return _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15); }

    template <int Q>
    static LOGITKERNELS_INLINE __m512i quad(const char* integers) {
        const __m512i lanes = _mm512_loadu_si512(integers + Q / 2 * 64);
        return _mm512_and_si512(Q % 2 ? _mm512_srli_epi16(lanes, 4) : lanes, _mm512_set1_epi8(15));
    }
    // Lookup ignores the bits above a nibble.
    static LOGITKERNELS_INLINE __m512 float_table() {
        const __m512i ids = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(ids, _mm512_set1_epi32(offset)));
    }

    template <int P>
    static LOGITKERNELS_INLINE __m512 even(const char* integers) {
        return _mm512_permutexvar_ps(shifted<P>(integers, 0), float_table());
    }
    template <int P>
    static LOGITKERNELS_INLINE __m512 odd(const char* integers) {
        return _mm512_permutexvar_ps(shifted<P>(integers, 16), float_table());
    }
#else
    template <int P>
    static LOGITKERNELS_INLINE __m512i pair(const char* integers) {
        const __m512i lanes = _mm512_loadu_si512(integers + P / 4 * 64);
        const __m512i shifted = _mm512_srli_epi16(lanes, 4 * (P % 4));
        const __m512i nibbles = P % 4 == 3 ? shifted : _mm512_and_si512(shifted, _mm512_set1_epi16(15));
        return offset == 0 ? nibbles : _mm512_sub_epi16(nibbles, _mm512_set1_epi16(offset));
    }
    static LOGITKERNELS_INLINE __m512 floats(__m512i nibbles) {
        const __m512i masked = _mm512_and_si512(nibbles, _mm512_set1_epi32(15));
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(masked, _mm512_set1_epi32(offset)));
    }
    template <int P>
    static LOGITKERNELS_INLINE __m512 even(const char* integers) {
        return floats(shifted<P>(integers, 0));
    }
    template <int P>
    static LOGITKERNELS_INLINE __m512 odd(const char* integers) {
        return floats(shifted<P>(integers, 16));
    }
#endif
};

struct Bytes {
    static constexpr bool has_minimum = false;
    static constexpr int64_t integer_bytes = 512;

#ifdef LOGITKERNELS_AVX512
    static constexpr int offset = 128;

    static __m128i byte_order() { return _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

    // Two half vectors of two steps each, their 16-bit words in turn.
    template <int Q>
    static LOGITKERNELS_INLINE __m512i quad(const char* integers) {
        const __m512i in_turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                                 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512i words = _mm512_permutexvar_epi16(in_turn, _mm512_loadu_si512(integers + Q * 64));
        return _mm512_xor_si512(words, _mm512_set1_epi8(int8_t(0x80)));
    }
#else
    template <int P>
    static LOGITKERNELS_INLINE __m512i pair(const char* integers) {
        return load_int8(integers + P * 32);
    }
#endif
    template <int P>
    static LOGITKERNELS_INLINE __m512i words(const char* integers) {
        return load_int16(integers + P * 32);
    }
    template <int P>
    static LOGITKERNELS_INLINE __m512 even(const char* integers) {
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words<P>(integers), 24), 24));
    }
    template <int P>
    static LOGITKERNELS_INLINE __m512 odd(const char* integers) {
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(words<P>(integers), 8));
    }
};

float sum_of(const float* block) {
    return _mm512_reduce_add_ps(_mm512_add_ps(load(block, 0xffff), load(block + kLanes, 0xffff)));
}

#ifdef LOGITKERNELS_AVX512
// 16 integers below 32,640 in magnitude as 256 times an upper byte plus a lower one, both signed: the upper bytes of a block
// lie before its lower ones.
void store_bytes(char* upper, const __m512& integers, __m128i order) {
    const __m512i values = _mm512_cvtps_epi32(integers);
    const __m512i above = _mm512_srai_epi32(_mm512_add_epi32(values, _mm512_set1_epi32(128)), 8);
    const auto store_ordered = [&](char* target, __m512i bytes) {
        const __m128i ordered = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(bytes), order);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(target), ordered);
    };
    store_ordered(upper, above);
    store_ordered(upper + kBlock, values);
}
#endif

// A block of activations as 16-bit integers times a power of two, the least one with which they stay below 32,640 in
// magnitude: what is rounded away is at most 2^-15 of the largest, or hardly more. A block with an infinity or NaN is NaN.
template <class Format>
void round_block(const float* source, const ActivationBlocks& blocks, int64_t place) {
    const __m512 low = load(source, 0xffff), high = load(source + kLanes, 0xffff);
    const auto absolute = [](const __m512& v) {
        return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(INT32_MAX)));
    };
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(absolute(low), absolute(high)));
    const bool has_nan = (_mm512_cmp_ps_mask(low, low, _CMP_UNORD_Q) | _mm512_cmp_ps_mask(high, high, _CMP_UNORD_Q)) != 0;
    int16_t* integers = blocks.integers + place * kBlock;
    if (has_nan || std::isinf(largest)) {
        std::fill_n(integers, kBlock, int16_t(0));
        blocks.scales[place] = blocks.sums[place] = std::numeric_limits<float>::quiet_NaN();
        blocks.integer_sums[place] = 0;
        return;
    }
    // The scale is 2^-15 of the power of two above the largest, or 2^-14 where the largest would round to 32,640 or more
    // (what is added to the mantissa then carries); both it and its inverse are normal numbers.
    constexpr int32_t carry = 0x10100;
    const int32_t exponent = std::max((std::bit_cast<int32_t>(largest) + carry) >> 23, 15);
    const float scale = std::bit_cast<float>((exponent - 14) << 23);
    const __m512 inverse = _mm512_set1_ps(std::bit_cast<float>((268 - exponent) << 23));
    const auto rounded = [&](const __m512& v) {
        return _mm512_roundscale_ps(_mm512_mul_ps(v, inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    };
    const __m512 first = rounded(low), second = rounded(high);
#ifdef LOGITKERNELS_AVX512
    char* bytes = reinterpret_cast<char*>(integers);
    store_bytes(bytes, first, Format::byte_order());
    store_bytes(bytes + kLanes, second, Format::byte_order());
#else
    store_int16(integers, first);
    store_int16(integers + kLanes, second);
#endif
    const float sum = _mm512_reduce_add_ps(_mm512_add_ps(first, second));  // exact
    blocks.scales[place] = scale;
    blocks.sums[place] = scale * sum;
    blocks.integer_sums[place] = int32_t(sum);
}

// Rows of activations in the type that a product multiplies, from some row on.
template <class Element>
struct Inputs {
    const Element* x;
    int64_t stride;
    int64_t blocks;  // of a row
    const float* block_sums;
    const float* block_scales;    // of integers
    const int32_t* integer_sums;
};

template <class Step>
LOGITKERNELS_INLINE void for_each_pair(Step step) {
    [&]<int... P>(std::integer_sequence<int, P...>) __attribute__((always_inline)) {
        (step.template operator()<P>(), ...);
    }(std::make_integer_sequence<int, kBlock / 2>());
}

// A block of G groups of 16 features, pair by pair.
template <class Product, class Format, int G, int R>
LOGITKERNELS_INLINE void add_pairs(const char* integers, const typename Product::Element* x, int64_t stride,
                                   typename Product::Sum (&sums)[G][R]) {
    for_each_pair([&]<int P>() __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g)
            Product::template add_packed<Format, P, R>(integers + g * Format::integer_bytes, x + 2 * P, stride, sums[g]);
    });
}

// How q and x meet. `inputs` is what of the activations is multiplied; a block's sums of 16 features are a Sum, which
// `scaled` turns into float32. `add_block` unpacks integers where it uses them; a product that unpacks pairs can do so into
// a scratch panel for many rows instead.

// Sums over a block of integers are exact in int32. On AVX2 pairs of int16 are multiplied. With AVX-512 quads of bytes are,
// the activations' upper bytes first: that is as many multiplications, but nibbles become bytes in half as many instructions
// as int16, and so few that a scratch panel is not worth it.
struct Dot {
    using Element = int16_t;
    using Sum = __m512i;

    static Inputs<int16_t> inputs(const Activations& x, int64_t k) {
        return {x.blocks.integers, k, k / kBlock, x.blocks.sums, x.blocks.scales, x.blocks.integer_sums};
    }
    static LOGITKERNELS_INLINE __m512 scaled(__m512i sum, const Inputs<int16_t>& in, int64_t block) {
        return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(in.block_scales[block]));
    }

#ifdef LOGITKERNELS_AVX512
    static constexpr bool has_scratch = false;
    static constexpr int fused_rows = 8;
    template <int R>
    static constexpr int groups_together = kVectors;

    template <class Format, int G, int R>
    static LOGITKERNELS_INLINE void add_block(const char* integers, const Inputs<int16_t>& in, int64_t b,
                                              __m512i (&sums)[G][R]) {
        const char* upper = reinterpret_cast<const char*>(in.x + b * kBlock);
        const char* lower = upper + kBlock;
        const int64_t stride = in.stride * int64_t(sizeof(int16_t));
        // What the upper bytes come to: 256 times their sum, less the offset that every integer has.
        const auto weighed = [&](__m512i sum, int r) __attribute__((always_inline)) {
            const __m512i shifted = _mm512_slli_epi32(sum, 8);
            if constexpr (Format::offset == 0) return shifted;
            return _mm512_sub_epi32(shifted, _mm512_set1_epi32(Format::offset * in.integer_sums[r * in.blocks + b]));
        };
        if constexpr (G * R <= 8) {
            // The registers hold the sums of both: integers are unpacked once for the two.
            __m512i parts[2][G][R] = {};
            add_quads<Format>(integers, {upper, lower}, stride, parts);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int g = 0; g < G; ++g) sums[g][r] = _mm512_add_epi32(weighed(parts[0][g][r], r), parts[1][g][r]);
        } else {
            __m512i part[1][G][R] = {};
            add_quads<Format>(integers, {upper}, stride, part);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int g = 0; g < G; ++g) part[0][g][r] = weighed(part[0][g][r], r);
            add_quads<Format>(integers, {lower}, stride, part);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int g = 0; g < G; ++g) sums[g][r] = part[0][g][r];
        }
    }

  private:
    // sums[p][g][r] += integers of group g times the bytes of row r at x[p]
    template <class Format, int P, int G, int R>
    static LOGITKERNELS_INLINE void add_quads(const char* integers, const char* const (&x)[P], int64_t stride,
                                              __m512i (&sums)[P][G][R]) {
        [&]<int... Q>(std::integer_sequence<int, Q...>) __attribute__((always_inline)) {
            (add_quad<Format, Q>(integers, x, stride, sums), ...);
        }(std::make_integer_sequence<int, kBlock / 4>());
    }
    template <class Format, int Q, int P, int G, int R>
    static LOGITKERNELS_INLINE void add_quad(const char* integers, const char* const (&x)[P], int64_t stride,
                                             __m512i (&sums)[P][G][R]) {
        __m512i q[G];
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g) {
            q[g] = Format::template quad<Q>(integers + g * Format::integer_bytes);
            asm("" : "+v"(q[g]));  // unpacked once, not for every row
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) {
                int32_t quad;
                __builtin_memcpy(&quad, x[p] + r * stride + 4 * Q, sizeof quad);
                const __m512i factor = _mm512_set1_epi32(quad);
#pragma GCC unroll 2
                for (int g = 0; g < G; ++g) sums[p][g][r] = _mm512_dpbusd_epi32(sums[p][g][r], q[g], factor);
            }
    }
#else
    static constexpr bool has_scratch = true;
    static constexpr int fused_rows = 4;
    static constexpr int64_t unpacked_bytes = 64;
    // The sums of one group of a lone row are too few to hide the latency of a multiply-add.
    template <int R>
    static constexpr int groups_together = R == 1 ? kVectors : 1;

    template <class Format, int G, int R>
    static LOGITKERNELS_INLINE void add_block(const char* integers, const Inputs<int16_t>& in, int64_t b,
                                              __m512i (&sums)[G][R]) {
        add_pairs<Dot, Format>(integers, in.x + b * kBlock, in.stride, sums);
    }
    template <class Format, int P>
    static LOGITKERNELS_INLINE void unpack(const char* integers, char* scratch) {
        _mm512_store_si512(scratch, Format::template pair<P>(integers));
    }
    template <class Format, int P, int R>
    static LOGITKERNELS_INLINE void add_packed(const char* integers, const int16_t* x, int64_t stride, __m512i (&sums)[R]) {
        add<R>(Format::template pair<P>(integers), x, stride, sums);
    }
    template <int R>
    static LOGITKERNELS_INLINE void add_unpacked(const char* scratch, const int16_t* x, int64_t stride, __m512i (&sums)[R]) {
        add<R>(_mm512_load_si512(scratch), x, stride, sums);
    }
    template <int R>
    static LOGITKERNELS_INLINE void add(__m512i pairs, const int16_t* x, int64_t stride, __m512i (&sums)[R]) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            int32_t pair;
            __builtin_memcpy(&pair, x + r * stride, sizeof pair);
            sums[r] = _mm512_dpwssd_epi32(sums[r], pairs, _mm512_set1_epi32(pair));
        }
    }
#endif
};

// One step at a time, in float32.
struct Fma {
    using Element = float;
    using Sum = __m512;

    static constexpr bool has_scratch = true;
    static constexpr int fused_rows = 4;
    static constexpr int64_t unpacked_bytes = 128;
    template <int R>
    static constexpr int groups_together = kRegisterSums == 6 && R == 1 ? kVectors : 1;

    static Inputs<float> inputs(const Activations& x, int64_t k) {
        return {static_cast<const float*>(x.data), x.stride, k / kBlock, x.blocks.sums, nullptr, nullptr};
    }
    static LOGITKERNELS_INLINE __m512 scaled(__m512 sum, const Inputs<float>&, int64_t) { return sum; }

    template <class Format, int G, int R>
    static LOGITKERNELS_INLINE void add_block(const char* integers, const Inputs<float>& in, int64_t b,
                                              __m512 (&sums)[G][R]) {
        add_pairs<Fma, Format>(integers, in.x + b * kBlock, in.stride, sums);
    }
    template <class Format, int P>
    static LOGITKERNELS_INLINE void unpack(const char* integers, char* scratch) {
        _mm512_store_ps(scratch, Format::template even<P>(integers));
        _mm512_store_ps(scratch + 64, Format::template odd<P>(integers));
    }
    template <class Format, int P, int R>
    static LOGITKERNELS_INLINE void add_packed(const char* integers, const float* x, int64_t stride, __m512 (&sums)[R]) {
        const __m512 even = Format::template even<P>(integers), odd = Format::template odd<P>(integers);
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

// Where things lie in a panel.
template <class Format>
constexpr int64_t block_bytes = kVectors * (kScaleBytes + Format::integer_bytes);

template <class Format>
int64_t minima_bytes(int64_t blocks) {
    return Format::has_minimum ? blocks * kVectors * kScaleBytes : 0;
}

template <class Format>
int64_t panel_bytes(int64_t blocks) {
    return minima_bytes<Format>(blocks) + blocks * block_bytes<Format>;
}

template <class Byte>
Byte* minima_at(Byte* panel, int64_t b, int64_t group) {
    return panel + (b * kVectors + group) * kScaleBytes;
}

template <class Format, class Byte>
Byte* integers_at(Byte* block, int64_t group) {
    return block + kVectors * kScaleBytes + group * Format::integer_bytes;
}

template <class Element>
Inputs<Element> from_row(Inputs<Element> in, int64_t row) {
    in.x += row * in.stride;
    in.block_sums += row * in.blocks;
    if (in.block_scales != nullptr) {
        in.block_scales += row * in.blocks;
        in.integer_sums += row * in.blocks;
    }
    return in;
}

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

// Meanwhile the next panel is fetched: of its blocks, every `turns`th from `turn` on.
template <class Format, class Product, int R>
void fused_tile(const char* panel, const Inputs<typename Product::Element>& in, int64_t turn, int64_t turns,
                const Target& target) {
    constexpr int G = Product::template groups_together<R>;
    const int64_t next = panel_bytes<Format>(in.blocks);
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
                for (int64_t line = 0; line < block_bytes<Format>; line += 64) prefetch(block + next + line);
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

// In the file a Q4 block is d, (m,) and 16 bytes whose lower nibbles are steps 0 to 15 and whose upper ones are steps 16 to
// 31; a Q8_0 block is d and 32 int8.
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

// tile<R>() for the R that `rows` is, at most Most.
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
    // tile(turn, turns, row, size) for each tile of the rows from `first` on, in sizes as equal as can be.
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

void finish_columns(const Activations& x, int64_t row, int64_t first, int64_t last) {
    if (!reads_blocks(x.kind)) return;
    for (int64_t b = first / kBlock; b < last / kBlock; ++b) {
        const int64_t place = row * x.stride / kBlock + b;
        const float* block = static_cast<const float*>(x.data) + place * kBlock;
        switch (x.kind) {
            case kQ41Fma: x.blocks.sums[place] = sum_of(block); break;
            case kQ40Dot: round_block<Nibbles<false>>(block, x.blocks, place); break;
            case kQ41Dot: round_block<Nibbles<true>>(block, x.blocks, place); break;
            default: round_block<Bytes>(block, x.blocks, place);
        }
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
// `target` is zeroed and holds ceil(n / 32) panels.
extern "C" void logitkernels_pack_gguf(const uint8_t* raw, int64_t kind, int64_t n, int64_t k, char* target, int threads) {
    switch (kind) {
        case kQ40Dot: return pack_format<Nibbles<false>>(raw, n, k / kBlock, target, threads);
        case kQ41Dot: return pack_format<Nibbles<true>>(raw, n, k / kBlock, target, threads);
        default: return pack_format<Bytes>(raw, n, k / kBlock, target, threads);
    }
}
