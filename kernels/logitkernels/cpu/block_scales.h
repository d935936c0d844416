// Scales and minima of the block formats: their layout at the head of a panel, and their values.
//
// A block of 32 weights has one scale, or one for each half: `parts` of them. A part's weight is d q + m. All
// scales of a panel lie before its integers. Each kind defines
//
//   head_bytes(blocks)               bytes of the scales and minima of a panel
//   scale<H>(head, blocks, b, g)     d of part H of block b for group g of 16 features, as float32, exactly
//   minimum<H>(head, blocks, b, g)   m, where the format has a minimum
//   put(head, blocks, b, g, lane, unit, i)   stores those of one feature, which are block i's of the unit
//   scale_of(unit, s)              d of part s of the unit, and m: minimum_of
#pragma once

#include <bit>
#include <cstring>

#include "linear_tile.h"
#include "vector.h"

namespace logitkernels {

constexpr int64_t kSuperBlocks = 8;         // blocks of 32 that share a float16 scale in the K formats
constexpr int64_t kFloat16Bytes = kLanes * 2;  // of a vector of 16 features
constexpr int64_t kFloat32Bytes = kLanes * 4;

// What one feature has in a file as one piece: a block of 32 weights, a group or a superblock of several.
struct Unit {
    uint16_t scale, minimum;       // float16 of the block or superblock
    float group_scale;             // float32 of the group
    uint8_t zero;                  // of the group
    uint8_t scales[2 * kSuperBlocks];  // of the parts
    uint8_t minima[2 * kSuperBlocks];
    uint8_t integers[kSuperBlocks * kSumBlock];  // as stored, without a sign
};

inline float float16_value(uint16_t float16) {
    alignas(32) const uint16_t vector[kLanes] = {float16};
    alignas(64) float values[kLanes];
    _mm512_store_ps(values, load_float16(reinterpret_cast<const char*>(vector)));
    return values[0];
}

template <class Byte>
Byte* vector_at(Byte* vectors, int64_t b, int64_t group, int64_t bytes) {
    return vectors + (b * kVectors + group) * bytes;
}

// A float16 scale, and perhaps a float16 minimum, for each block: d[blocks][2][16], m[blocks][2][16].
template <bool kHasMinimum>
struct Float16Scales {
    static constexpr int parts = 1;
    static constexpr bool has_minimum = kHasMinimum;

    static int64_t head_bytes(int64_t blocks) { return blocks * kVectors * kFloat16Bytes * (kHasMinimum ? 2 : 1); }

    template <int H>
    static LOGITKERNELS_INLINE __m512 scale(const char* head, int64_t, int64_t b, int64_t group) {
        return load_float16(vector_at(head, b, group, kFloat16Bytes));
    }
    template <int H>
    static LOGITKERNELS_INLINE __m512 minimum(const char* head, int64_t blocks, int64_t b, int64_t group) {
        return load_float16(vector_at(head, blocks + b, group, kFloat16Bytes));
    }
    static void put(char* head, int64_t blocks, int64_t b, int64_t group, int64_t lane, const Unit& unit, int64_t) {
        std::memcpy(vector_at(head, b, group, kFloat16Bytes) + lane * 2, &unit.scale, 2);
        if constexpr (kHasMinimum)
            std::memcpy(vector_at(head, blocks + b, group, kFloat16Bytes) + lane * 2, &unit.minimum, 2);
    }
    static float scale_of(const Unit& unit, int64_t) { return float16_value(unit.scale); }
    static float minimum_of(const Unit& unit, int64_t) { return float16_value(unit.minimum); }
};

// A power of two for each block, as its biased exponent e: 2^(e - 128). e[blocks][2][16].
struct ExponentScales {
    static constexpr int parts = 1;
    static constexpr bool has_minimum = false;

    static int64_t head_bytes(int64_t blocks) { return blocks * kVectors * kLanes; }

    // The product of two normal numbers, because 2^-128 and 2^-127 are none.
    template <int H>
    static LOGITKERNELS_INLINE __m512 scale(const char* head, int64_t, int64_t b, int64_t group) {
        const __m512i e = widen_uint8(vector_at(head, b, group, kLanes)), half = _mm512_srli_epi32(e, 1);
        const auto power = [](const __m512i& exponent) __attribute__((always_inline)) {
            const __m512i biased = _mm512_sub_epi32(exponent, _mm512_set1_epi32(64 - 127));
            return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
        };
        return _mm512_mul_ps(power(half), power(_mm512_sub_epi32(e, half)));
    }
    static void put(char* head, int64_t, int64_t b, int64_t group, int64_t lane, const Unit& unit, int64_t) {
        vector_at(head, b, group, kLanes)[lane] = char(unit.scales[0]);
    }
    static float scale_of(const Unit& unit, int64_t) {
        const uint32_t e = unit.scales[0];
        return std::bit_cast<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    }
};

// A float32 scale and an integer zero for each group of kBlocks blocks, whose weights are d (q - z): d[groups][2][16]
// float32, z[groups][2][16] bytes. The integers are multiplied 8 below what is stored, so m = -d (z - 8), which is 0
// where weights are symmetric. It is exact for scales of up to 20 bits, such as float16 and bfloat16.
template <int kBlocks>
struct ZeroScales {
    static constexpr int parts = 1;
    static constexpr bool has_minimum = true;

    static int64_t head_bytes(int64_t blocks) { return blocks / kBlocks * kVectors * (kFloat32Bytes + kLanes); }

    template <int H>
    static LOGITKERNELS_INLINE __m512 scale(const char* head, int64_t, int64_t b, int64_t group) {
        return _mm512_load_ps(vector_at(head, b / kBlocks, group, kFloat32Bytes));
    }
    template <int H>
    static LOGITKERNELS_INLINE __m512 minimum(const char* head, int64_t blocks, int64_t b, int64_t group) {
        const __m512i z = widen_uint8(vector_at(zeros(head, blocks), b / kBlocks, group, kLanes));
        return _mm512_mul_ps(scale<H>(head, blocks, b, group),
                             _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(8), z)));
    }
    static float scale_of(const Unit& unit, int64_t) { return unit.group_scale; }
    static float minimum_of(const Unit& unit, int64_t) { return unit.group_scale * float(8 - int(unit.zero)); }
    static void put(char* head, int64_t blocks, int64_t b, int64_t group, int64_t lane, const Unit& unit, int64_t) {
        std::memcpy(vector_at(head, b / kBlocks, group, kFloat32Bytes) + lane * 4, &unit.group_scale, 4);
        vector_at(zeros(head, blocks), b / kBlocks, group, kLanes)[lane] = char(unit.zero);
    }

  private:
    template <class Byte>
    static Byte* zeros(Byte* head, int64_t blocks) {
        return head + blocks / kBlocks * kVectors * kFloat32Bytes;
    }
};

// Integer scales of the parts of a block, to be multiplied by the superblock's float16.
template <bool kSigned, int kParts>
struct ByteScales {
    static constexpr int parts = kParts;
    static constexpr int64_t bytes = kParts * kLanes;  // of a block in 16 features: [parts][16]

    template <int H>
    static LOGITKERNELS_INLINE __m512 load(const char* source) {
        return _mm512_cvtepi32_ps(kSigned ? widen_int8(source + H * kLanes) : widen_uint8(source + H * kLanes));
    }
    static void put(char* target, int64_t lane, const uint8_t* parts_of_block) {
        for (int h = 0; h < kParts; ++h) target[h * kLanes + lane] = char(parts_of_block[h]);
    }
    static float value_of(uint8_t part) { return kSigned ? int8_t(part) : part; }
};

// The scales of both halves of a block in one byte.
struct NibbleScales {
    static constexpr int parts = 2;
    static constexpr int64_t bytes = kLanes;

    template <int H>
    static LOGITKERNELS_INLINE __m512 load(const char* source) {
        const __m512i both = widen_uint8(source);
        return _mm512_cvtepi32_ps(H == 0 ? _mm512_and_si512(both, _mm512_set1_epi32(15)) : _mm512_srli_epi32(both, 4));
    }
    static void put(char* target, int64_t lane, const uint8_t* parts_of_block) {
        target[lane] = char(parts_of_block[0] | parts_of_block[1] << 4);
    }
    static float value_of(uint8_t part) { return part; }
};

// Scales of the K formats. d[superblocks][2][16] float16, the blocks' integers [blocks][2][Part::bytes], and the
// same for minima. A part's scale is a product of 11 bits by at most 8, exact in float32.
template <class Part, bool kHasMinimum>
struct SuperScales {
    static constexpr int parts = Part::parts;
    static constexpr bool has_minimum = kHasMinimum;

    static int64_t head_bytes(int64_t blocks) { return section_bytes(blocks) * (kHasMinimum ? 2 : 1); }

    template <int H>
    static LOGITKERNELS_INLINE __m512 scale(const char* head, int64_t blocks, int64_t b, int64_t group) {
        const char* integers = head + float16_bytes(blocks);
        return _mm512_mul_ps(load_float16(vector_at(head, b / kSuperBlocks, group, kFloat16Bytes)),
                             Part::template load<H>(vector_at(integers, b, group, Part::bytes)));
    }
    template <int H>
    static LOGITKERNELS_INLINE __m512 minimum(const char* head, int64_t blocks, int64_t b, int64_t group) {
        return scale<H>(head + section_bytes(blocks), blocks, b, group);
    }
    static void put(char* head, int64_t blocks, int64_t b, int64_t group, int64_t lane, const Unit& unit, int64_t i) {
        put_section(head, blocks, b, group, lane, unit.scale, unit.scales + i * parts);
        if constexpr (kHasMinimum)
            put_section(head + section_bytes(blocks), blocks, b, group, lane, unit.minimum, unit.minima + i * parts);
    }
    static float scale_of(const Unit& unit, int64_t s) { return float16_value(unit.scale) * Part::value_of(unit.scales[s]); }
    static float minimum_of(const Unit& unit, int64_t s) {
        return float16_value(unit.minimum) * Part::value_of(unit.minima[s]);
    }

  private:
    static int64_t float16_bytes(int64_t blocks) { return ceil_div(blocks, kSuperBlocks) * kVectors * kFloat16Bytes; }
    static int64_t section_bytes(int64_t blocks) { return float16_bytes(blocks) + blocks * kVectors * Part::bytes; }

    static void put_section(char* section, int64_t blocks, int64_t b, int64_t group, int64_t lane, uint16_t float16,
                            const uint8_t* parts_of_block) {
        std::memcpy(vector_at(section, b / kSuperBlocks, group, kFloat16Bytes) + lane * 2, &float16, 2);
        Part::put(vector_at(section + float16_bytes(blocks), b, group, Part::bytes), lane, parts_of_block);
    }
};

}  // namespace logitkernels
