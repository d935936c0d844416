// Properties of blocks of 32 activations, for products with weights in blocks.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "block_formats.h"

namespace logitkernels {
namespace {

float sum_of(const float* block) {
    return _mm512_reduce_add_ps(_mm512_add_ps(load(block, 0xffff), load(block + kLanes, 0xffff)));
}

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
        blocks.scales[place] = blocks.sums[place] = std::numeric_limits<float>::quiet_NaN();
        blocks.integer_sums[place] = 0;
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

}  // namespace logitkernels
