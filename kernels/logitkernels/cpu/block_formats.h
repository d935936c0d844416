// Layout of the integers of the block formats in panels; see quantized.h.
#pragma once

#include <type_traits>

#include "block_scales.h"

namespace logitkernels {

constexpr int64_t kBlock = kSumBlock;

// Integers are stored `offset` above their values. A kind of integers unpacks steps of k for 16 features of a block:
//
//   raw<P>(integers)           two neighbouring steps as stored, as int16, P from 0 to 15
//   even<P>, odd<P>(integers)  the value of one of the two steps as float32
//   quad<Q>(integers)          AVX-512, where has_quads: four steps as unsigned bytes, `quad_offset` above their
//                              values, Q from 0 to 7
//   put(quads, integers)       stores a block of 16 features, of each four integers in a word: [8][16]
//   value_of(stored)           the value of a stored integer
//   order                      order in which dot products read the integers of activations
//
// The bytes of quads lie in the order that is cheapest to unpack: of 16 activations, byte i's is
// byte_order()[i]. What differs between formats with one kind of integers is a member, not a parameter of the
// template, so that they share the code of products.

#ifdef LOGITKERNELS_AVX512
constexpr bool kQuads = true;
#else
constexpr bool kQuads = false;
#endif

// Vectors of 16-bit words, two for each feature: the even and the odd steps. A word holds as many integers as fit
// in it. The bits that are left in the words of a block make up its last integers:
//
//     bits  integers of a word  words  last integers
//     2     8                   2
//     3     5                   3      1: a bit of each word
//     4     4                   4
//     5     3                   5      1: a bit of each word
//     6     2                   6      4: four bits of word i, and two of word 4 + i / 2
template <int kBits>
struct PackedIntegers {
    int32_t offset;

    static constexpr int64_t integer_bytes = kBits * 64;  // of a block
    static constexpr bool has_quads = kQuads && kBits == 4;
    static constexpr IntegerOrder order = has_quads ? kNibbleQuads : kWords;
    int32_t quad_offset() const { return offset; }

    template <int P>
    LOGITKERNELS_INLINE __m512i raw(const char* integers) const {
        if constexpr (P < kWhole) {
            constexpr int shift = kBits * (P % kOfWord);
            const __m512i words = word(integers, P / kOfWord);
            const __m512i shifted = shift == 0 ? words : _mm512_srli_epi16(words, shift);
            return shift + kBits == 16 ? shifted : _mm512_and_si512(shifted, _mm512_set1_epi16(kMask));
        } else if constexpr (kBits == 6) {
            constexpr int i = P - kWhole;
            const __m512i upper = _mm512_srli_epi16(word(integers, 4 + i / 2), 8 + i % 2 * 2);
            return _mm512_or_si512(_mm512_srli_epi16(word(integers, i), 12),
                                   _mm512_and_si512(upper, _mm512_set1_epi16(0x30)));
        } else {
            __m512i bits = _mm512_srli_epi16(word(integers, 0), 15);
#pragma GCC unroll 5
            for (int i = 1; i < kBits; ++i) {
                const __m512i bit = _mm512_and_si512(word(integers, i), _mm512_set1_epi16(INT16_MIN));
                bits = _mm512_or_si512(bits, _mm512_srli_epi16(bit, 15 - i));
            }
            return bits;
        }
    }

    template <int P>
    LOGITKERNELS_INLINE __m512 even(const char* integers) const {
        return step<P, 0>(integers);
    }
    template <int P>
    LOGITKERNELS_INLINE __m512 odd(const char* integers) const {
        return step<P, 1>(integers);
    }

#ifdef LOGITKERNELS_AVX512
    static __m128i byte_order() { return _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15); }

    template <int Q>
    LOGITKERNELS_INLINE __m512i quad(const char* integers) const {
        const __m512i lanes = word(integers, Q / 2);
        return _mm512_and_si512(Q % 2 ? _mm512_srli_epi16(lanes, 4) : lanes, _mm512_set1_epi8(15));
    }
#endif

    static void put(const uint32_t (&quads)[kBlock / 4][kLanes], char* integers) {
        uint32_t words[kBits][kLanes] = {};
#pragma GCC unroll 16
        for (int p = 0; p < kBlock / 2; ++p) {
            const int i = p - kWhole;
            for (int lane = 0; lane < kLanes; ++lane) {
                const uint32_t quad = quads[p / 2][lane] >> (p % 2 * 16), pair = (quad & 0xff) | (quad & 0xff00) << 8;
                if (i < 0) {
                    words[p / kOfWord][lane] |= pair << (kBits * (p % kOfWord));
                } else if (kBits == 6) {
                    words[i % kBits][lane] |= (pair & 0x000f000f) << 12;
                    words[(4 + i / 2) % kBits][lane] |= (pair >> 4 & 0x00030003) << (8 + i % 2 * 2 + 4);
                } else {
#pragma GCC unroll 5
                    for (int bit = 0; bit < kBits; ++bit) words[bit][lane] |= (pair >> bit & 0x00010001) << 15;
                }
            }
        }
        std::memcpy(integers, words, sizeof words);
    }
    int value_of(uint8_t stored) const { return int(stored) - offset; }

  private:
    static constexpr int kMask = (1 << kBits) - 1;
    static constexpr int kOfWord = 16 / kBits, kWhole = kOfWord * kBits;

    static LOGITKERNELS_INLINE __m512i word(const char* integers, int w) { return _mm512_loadu_si512(integers + w * 64); }

    template <int P, int kOdd>
    LOGITKERNELS_INLINE __m512 step(const char* integers) const {
        __m512i value;
        if constexpr (P < kWhole) {
            constexpr unsigned shift = kBits * (P % kOfWord) + 16 * kOdd;
            value = _mm512_srli_epi32(word(integers, P / kOfWord), shift);
#ifdef LOGITKERNELS_AVX512
            // The lookup ignores the bits above a nibble.
            if constexpr (kBits == 4) {
                const __m512i ids = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
                const __m512 values = _mm512_cvtepi32_ps(_mm512_sub_epi32(ids, _mm512_set1_epi32(offset)));
                return _mm512_permutexvar_ps(value, values);
            }
#endif
            if constexpr (shift + kBits < 32) value = _mm512_and_si512(value, _mm512_set1_epi32(kMask));
        } else {
            const __m512i pair = raw<P>(integers);
            value = kOdd ? _mm512_srli_epi32(pair, 16) : _mm512_and_si512(pair, _mm512_set1_epi32(kMask));
        }
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(value, _mm512_set1_epi32(offset)));
    }
};

// Nibbles that stand for 16 values of eight bits, in the layout of integers of four bits. A lookup adds 128.
struct LookedUp {
    uint8_t table[16];

    static constexpr int32_t offset = 128;
    static constexpr int64_t integer_bytes = 256;
    static constexpr bool has_quads = kQuads;
    static constexpr IntegerOrder order = PackedIntegers<4>::order;
    int32_t quad_offset() const { return offset; }

    // Looks up the lower or the upper nibble of each byte.
    LOGITKERNELS_INLINE __m512i bytes(const char* integers, int vector, int upper) const {
        const __m512i nibbles = _mm512_loadu_si512(integers + vector * 64);
        const __m512i shifted = upper ? _mm512_srli_epi16(nibbles, 4) : nibbles;
        return look_up(table, _mm512_and_si512(shifted, _mm512_set1_epi16(0x0f0f)));
    }
    template <int P>
    LOGITKERNELS_INLINE __m512i raw(const char* integers) const {
        const __m512i looked_up = bytes(integers, P / 4, P % 2);
        return P % 4 < 2 ? _mm512_and_si512(looked_up, _mm512_set1_epi16(255)) : _mm512_srli_epi16(looked_up, 8);
    }
    LOGITKERNELS_INLINE __m512 value(const __m512i& stored) const {
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(stored, _mm512_set1_epi32(offset)));
    }
    template <int P>
    LOGITKERNELS_INLINE __m512 even(const char* integers) const {
        return value(_mm512_and_si512(raw<P>(integers), _mm512_set1_epi32(255)));
    }
    template <int P>
    LOGITKERNELS_INLINE __m512 odd(const char* integers) const {
        return value(_mm512_srli_epi32(raw<P>(integers), 16));
    }

#ifdef LOGITKERNELS_AVX512
    static __m128i byte_order() { return PackedIntegers<4>::byte_order(); }

    template <int Q>
    LOGITKERNELS_INLINE __m512i quad(const char* integers) const {
        return bytes(integers, Q / 2, Q % 2);
    }
#endif

    static void put(const uint32_t (&quads)[kBlock / 4][kLanes], char* integers) { PackedIntegers<4>::put(quads, integers); }
    int value_of(uint8_t stored) const { return int(table[stored]) - offset; }
};

// Values of IQ4_NL and IQ4_XS, 128 above.
constexpr LookedUp kNonLinear{{1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241}};

// Twice the numbers of two exponent bits and one of mantissa, 128 above.
constexpr LookedUp kMicroscaling{{128, 129, 130, 131, 132, 134, 136, 140, 128, 127, 126, 125, 124, 122, 120, 116}};

// 16 half vectors of two steps, [16 features][2] int8.
struct Bytes {
    static constexpr int32_t offset = 0;
    static constexpr int64_t integer_bytes = 512;
    static constexpr bool has_quads = kQuads;
    static constexpr IntegerOrder order = has_quads ? kByteQuads : kWords;
    int32_t quad_offset() const { return 128; }

#ifdef LOGITKERNELS_AVX512
    static __m128i byte_order() { return _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

    // Interleaves the 16-bit words of two half vectors of two steps each.
    template <int Q>
    LOGITKERNELS_INLINE __m512i quad(const char* integers) const {
        const __m512i in_turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                                 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512i words = _mm512_permutexvar_epi16(in_turn, _mm512_loadu_si512(integers + Q * 64));
        return _mm512_xor_si512(words, _mm512_set1_epi8(int8_t(0x80)));
    }
#else
    template <int P>
    LOGITKERNELS_INLINE __m512i raw(const char* integers) const {
        return load_int8(integers + P * 32);
    }
#endif
    template <int P>
    LOGITKERNELS_INLINE __m512i words(const char* integers) const {
        return load_int16(integers + P * 32);
    }
    template <int P>
    LOGITKERNELS_INLINE __m512 even(const char* integers) const {
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words<P>(integers), 24), 24));
    }
    template <int P>
    LOGITKERNELS_INLINE __m512 odd(const char* integers) const {
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(words<P>(integers), 8));
    }

    static void put(const uint32_t (&quads)[kBlock / 4][kLanes], char* integers) {
        uint16_t pairs[kBlock / 2][kLanes];
        for (int j = 0; j < kBlock / 4; ++j)
            for (int lane = 0; lane < kLanes; ++lane) {
                pairs[2 * j][lane] = uint16_t(quads[j][lane]);
                pairs[2 * j + 1][lane] = uint16_t(quads[j][lane] >> 16);
            }
        std::memcpy(integers, pairs, sizeof pairs);
    }
    int value_of(uint8_t stored) const { return int8_t(stored); }
};

template <auto kIntegers, class ScalesType>
struct BlockFormat {
    using Integers = std::remove_const_t<decltype(kIntegers)>;
    using Scales = ScalesType;
    static constexpr Integers integers = kIntegers;

    static int64_t integers_begin(int64_t blocks) { return round_up(Scales::head_bytes(blocks), 64); }
    static int64_t panel_bytes(int64_t blocks) {
        return integers_begin(blocks) + blocks * kVectors * Integers::integer_bytes;
    }
};

using Q40 = BlockFormat<PackedIntegers<4>{8}, Float16Scales<false>>;
using Q41 = BlockFormat<PackedIntegers<4>{0}, Float16Scales<true>>;
using Q50 = BlockFormat<PackedIntegers<5>{16}, Float16Scales<false>>;
using Q51 = BlockFormat<PackedIntegers<5>{0}, Float16Scales<true>>;
using Q80 = BlockFormat<Bytes{}, Float16Scales<false>>;
using Q2K = BlockFormat<PackedIntegers<2>{0}, SuperScales<NibbleScales, true>>;
using Q3K = BlockFormat<PackedIntegers<3>{4}, SuperScales<ByteScales<true, 2>, false>>;
using Q4K = BlockFormat<PackedIntegers<4>{0}, SuperScales<ByteScales<false, 1>, true>>;
using Q5K = BlockFormat<PackedIntegers<5>{0}, SuperScales<ByteScales<false, 1>, true>>;
using Q6K = BlockFormat<PackedIntegers<6>{32}, SuperScales<ByteScales<true, 2>, false>>;
using IQ4NL = BlockFormat<kNonLinear, Float16Scales<false>>;
using IQ4XS = BlockFormat<kNonLinear, SuperScales<ByteScales<true, 1>, false>>;
using MXFP4 = BlockFormat<kMicroscaling, ExponentScales>;
using Int4By32 = BlockFormat<PackedIntegers<4>{8}, ZeroScales<1>>;
using Int4By64 = BlockFormat<PackedIntegers<4>{8}, ZeroScales<2>>;
using Int4By128 = BlockFormat<PackedIntegers<4>{8}, ZeroScales<4>>;

// Calls use<Format>() for a type of blocks.
template <class Use>
LOGITKERNELS_INLINE void with_format(int64_t type, const Use& use) {
    switch (type) {
        case kQ40: return use.template operator()<Q40>();
        case kQ41: return use.template operator()<Q41>();
        case kQ50: return use.template operator()<Q50>();
        case kQ51: return use.template operator()<Q51>();
        case kQ80: return use.template operator()<Q80>();
        case kQ2K: return use.template operator()<Q2K>();
        case kQ3K: return use.template operator()<Q3K>();
        case kQ4K: return use.template operator()<Q4K>();
        case kQ5K: return use.template operator()<Q5K>();
        case kQ6K: return use.template operator()<Q6K>();
        case kIQ4NL: return use.template operator()<IQ4NL>();
        case kIQ4XS: return use.template operator()<IQ4XS>();
        case kMXFP4: return use.template operator()<MXFP4>();
        case kInt4By32: return use.template operator()<Int4By32>();
        case kInt4By64: return use.template operator()<Int4By64>();
        case kInt4By128: return use.template operator()<Int4By128>();
        default: std::abort();
    }
}

}  // namespace logitkernels
