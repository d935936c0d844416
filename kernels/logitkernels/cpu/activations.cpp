// Properties of blocks of 32 activations, for products with weights in blocks.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "block_formats.h"

namespace logitkernels {
namespace {

#ifdef LOGITKERNELS_AVX512
// Stores 16 integers below 32,640 in magnitude as 256 times an upper byte plus a lower one, both signed. The
// upper bytes of a block lie before its lower ones.
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

// Stores the integers of a block as the product with weights of the format reads them.
template <class Format>
void store_rounded(int16_t* target, const __m512& first, const __m512& second) {
#ifdef LOGITKERNELS_AVX512
    using Integers = typename Format::Integers;
    if constexpr (Integers::has_quads) {
        char* bytes = reinterpret_cast<char*>(target);
        store_bytes(bytes, first, Integers::byte_order());
        store_bytes(bytes + kLanes, second, Integers::byte_order());
        return;
    }
#endif
    store_int16(target, first);
    store_int16(target + kLanes, second);
}

// Rounds a block of activations to 16-bit integers times a power of two, the smallest that keeps them below
// 32,640 in magnitude. The rounding error is at most 2^-15 of the largest, or hardly more. A block with an
// infinity or NaN is NaN.
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
        blocks.scales[place] = std::numeric_limits<float>::quiet_NaN();
        std::fill_n(blocks.sums + place * Format::Scales::parts, Format::Scales::parts, blocks.scales[place]);
        std::fill_n(blocks.integer_sums + place * Format::Scales::parts, Format::Scales::parts, 0);
        return;
    }
    // The scale is 2^-15 of the power of two above the largest, or 2^-14 where the largest would round to
    // 32,640 or more (the number added to the mantissa then carries). Both the scale and its inverse are
    // normal numbers.
    constexpr int32_t carry = 0x10100;
    const int32_t exponent = std::max((std::bit_cast<int32_t>(largest) + carry) >> 23, 15);
    const float scale = std::bit_cast<float>((exponent - 14) << 23);
    const __m512 inverse = _mm512_set1_ps(std::bit_cast<float>((268 - exponent) << 23));
    const auto rounded = [&](const __m512& v) {
        return _mm512_roundscale_ps(_mm512_mul_ps(v, inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    };
    const __m512 first = rounded(low), second = rounded(high);
    store_rounded<Format>(integers, first, second);
    blocks.scales[place] = scale;
    const auto put_sum = [&](int64_t part, const __m512& rounded_part) {
        const float sum = _mm512_reduce_add_ps(rounded_part);  // exact
        blocks.sums[part] = scale * sum;
        blocks.integer_sums[part] = int32_t(sum);
    };
    if constexpr (Format::Scales::parts == 1) {
        put_sum(place, _mm512_add_ps(first, second));
    } else {
        put_sum(2 * place, first);
        put_sum(2 * place + 1, second);
    }
}

template <class Format>
void sum_block(const float* source, const ActivationBlocks& blocks, int64_t place) {
    const __m512 low = load(source, 0xffff), high = load(source + kLanes, 0xffff);
    if constexpr (Format::Scales::parts == 1) {
        blocks.sums[place] = _mm512_reduce_add_ps(_mm512_add_ps(low, high));
    } else {
        blocks.sums[2 * place] = _mm512_reduce_add_ps(low);
        blocks.sums[2 * place + 1] = _mm512_reduce_add_ps(high);
    }
}

}  // namespace

void finish_columns(const Activations& x, int64_t row, int64_t first, int64_t last) {
    if (!has_blocks(x.kind)) return;
    with_format(block_type(x.kind), [&]<class Format>() {
        for (int64_t b = first / kBlock; b < last / kBlock; ++b) {
            const int64_t place = row * x.stride / kBlock + b;
            const float* block = static_cast<const float*>(x.data) + place * kBlock;
            if (!is_fma_of_blocks(x.kind))
                round_block<Format>(block, x.blocks, place);
            else if constexpr (Format::Scales::has_minimum)
                sum_block<Format>(block, x.blocks, place);
        }
    });
}

}  // namespace logitkernels
