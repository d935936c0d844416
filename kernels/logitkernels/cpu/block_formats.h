// Layout of the block formats of GGUF files in panels; see quantized.h.
#pragma once

#include "linear_tile.h"
#include "vector.h"

namespace logitkernels {

constexpr int64_t kBlock = kSumBlock;
constexpr int64_t kScaleBytes = kLanes * 2;  // the scales, or the minima, of a block in 16 features

// A format unpacks steps of k for 16 features of a block:
//
//   quad<Q>(integers)          AVX-512: four steps as unsigned bytes, `offset` above the integers, Q from 0 to 7
//   pair<P>(integers)          elsewhere: two neighbouring steps as int16, P from 0 to 15
//   even<P>, odd<P>(integers)  one of the two steps as float32
//
// The bytes of quads lie in the order that is cheapest to unpack: of 16 activations, byte i's is
// byte_order()[i].

template <bool kHasMinimum>
struct Nibbles {
    static constexpr bool has_minimum = kHasMinimum;
    static constexpr int64_t integer_bytes = 256;  // of a block

    // Offset of a nibble's integer: 0 where the format has a minimum, else 8.
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
    // The lookup ignores the bits above a nibble.
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

    // Interleaves the 16-bit words of two half vectors of two steps each.
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

// Sizes and offsets within a panel.
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

}  // namespace logitkernels
