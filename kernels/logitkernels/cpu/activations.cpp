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

// Stores the integers of a block in each order that a product reads.
void store_rounded(const Activations& x, int64_t place, const __m512& first, const __m512& second) {
#ifdef LOGITKERNELS_AVX512
    const auto store_quads = [&](IntegerOrder order, __m128i byte_order) {
        if (!(x.forms & (kIntegers << order))) return;
        char* bytes = reinterpret_cast<char*>(x.blocks.integers[order] + place * kBlock);
        store_bytes(bytes, first, byte_order);
        store_bytes(bytes + kLanes, second, byte_order);
    };
    store_quads(kNibbleQuads, PackedIntegers<4>::byte_order());
    store_quads(kByteQuads, Bytes::byte_order());
#endif
    if (x.forms & (kIntegers << kWords)) {
        int16_t* words = x.blocks.integers[kWords] + place * kBlock;
        store_int16(words, first);
        store_int16(words + kLanes, second);
    }
}

// Rounds a block of activations to 16-bit integers times a power of two, the smallest that keeps them below
// 32,640 in magnitude. The rounding error is at most 2^-15 of the largest, or hardly more. A block with an
// infinity or NaN is NaN.
void round_block(const float* source, const Activations& x, int64_t place) {
    const __m512 low = load(source, 0xffff), high = load(source + kLanes, 0xffff);
    const auto absolute = [](const __m512& v) {
        return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(INT32_MAX)));
    };
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(absolute(low), absolute(high)));
    const bool has_nan = (_mm512_cmp_ps_mask(low, low, _CMP_UNORD_Q) | _mm512_cmp_ps_mask(high, high, _CMP_UNORD_Q)) != 0;
    const auto put_sum = [&](int h, int64_t part, float scale, float sum) {
        x.blocks.sums[h][part] = scale * sum;
        x.blocks.integer_sums[h][part] = int32_t(sum);
    };
    if (has_nan || std::isinf(largest)) {
        const float nan = std::numeric_limits<float>::quiet_NaN();
        const __m512 zeros = _mm512_setzero_ps();
        store_rounded(x, place, zeros, zeros);
        x.blocks.scales[place] = nan;
        for (int h = 0; h < 2; ++h)
            for (int part = 0; part <= h; ++part)
                if (x.forms & (kSums << h)) put_sum(h, place * (h + 1) + part, nan, 0.0f);
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
    store_rounded(x, place, first, second);
    x.blocks.scales[place] = scale;
    // The sums of integers are exact.
    if (x.forms & kSums) put_sum(0, place, scale, _mm512_reduce_add_ps(_mm512_add_ps(first, second)));
    if (x.forms & (kSums << 1)) {
        put_sum(1, 2 * place, scale, _mm512_reduce_add_ps(first));
        put_sum(1, 2 * place + 1, scale, _mm512_reduce_add_ps(second));
    }
}

void sum_block(const float* source, const Activations& x, int64_t place) {
    const __m512 low = load(source, 0xffff), high = load(source + kLanes, 0xffff);
    if (x.forms & kSums) x.blocks.sums[0][place] = _mm512_reduce_add_ps(_mm512_add_ps(low, high));
    if (x.forms & (kSums << 1)) {
        x.blocks.sums[1][2 * place] = _mm512_reduce_add_ps(low);
        x.blocks.sums[1][2 * place + 1] = _mm512_reduce_add_ps(high);
    }
}

int64_t forms_of_kind(int64_t kind) {
    if (!has_blocks(kind)) return kind == kBf16Dot || kind == kBf16Tiles ? int64_t(kRoundedRows) : 0;
    int64_t forms = 0;
    with_format(block_type(kind), [&]<class Format>() {
        const int64_t sums = kSums << (Format::Scales::parts - 1);
        if (!is_fma_of_blocks(kind))
            forms = (kIntegers << Format::Integers::order) | sums;
        else if (Format::Scales::has_minimum)
            forms = sums;
    });
    return forms;
}

}  // namespace

int64_t forms_of(const Linear& linear) {
    int64_t forms = 0;
    for (int64_t i = 0; i < linear.num_parts; ++i) forms |= forms_of_kind(linear.parts[i].kind);
    return forms;
}

void finish_columns(const Activations& x, int64_t row, int64_t first, int64_t last) {
    if (!x.has_blocks()) return;
    for (int64_t b = first / kBlock; b < last / kBlock; ++b) {
        const int64_t place = row * x.stride / kBlock + b;
        const float* block = static_cast<const float*>(x.data) + place * kBlock;
        if (x.has_integers())
            round_block(block, x, place);
        else
            sum_block(block, x, place);
    }
}

}  // namespace logitkernels
