// The vectors of AVX-512 for targets without it. The operations that the sources use have the same names and
// meaning here. Their 16 lanes are held in two registers of AVX2 or four of SSE or NEON.
//
// Every operation is the IEEE one, and sums over lanes keep their order, so results have the same bits as
// with AVX-512. Everything is in our namespace, where it hides declarations of immintrin.h that cannot be
// used here.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cmath>
#include <cstdint>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LOGITKERNELS_AVX2
#endif

// immintrin.h makes some of the names macros.
#undef _MM_FROUND_TO_NEAREST_INT
#undef _MM_FROUND_NO_EXC
#undef _CMP_UNORD_Q

namespace logitkernels {

#ifdef LOGITKERNELS_AVX2
constexpr int kParts = 2;
#else
constexpr int kParts = 4;
#endif
constexpr int kPartLanes = 16 / kParts;

typedef float float_part __attribute__((vector_size(64 / kParts)));
typedef double double_part __attribute__((vector_size(64 / kParts)));
typedef int32_t int_part __attribute__((vector_size(64 / kParts)));
typedef uint32_t uint_part __attribute__((vector_size(64 / kParts)));
typedef int16_t short_part __attribute__((vector_size(64 / kParts)));
typedef uint16_t ushort_part __attribute__((vector_size(64 / kParts)));

// Not a single vector of 64 bytes: GCC keeps vectors wider than a register in memory.
template <class Part, int N = kParts>
struct Parts {
    Part part[N];
};

using __m512 = Parts<float_part>;
using __m512d = Parts<double_part>;
using __m512i = Parts<int_part>;
using __mmask16 = uint16_t;
typedef int32_t __m128i __attribute__((vector_size(16)));

constexpr int _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8, _CMP_UNORD_Q = 3;

#define LOGITKERNELS_LAMBDA __attribute__((always_inline))

// Returns function(number of a part, that part of each vector) as a vector.
template <class Function, class... Vectors>
LOGITKERNELS_INLINE auto by_part(Function function, const Vectors&... v) {
    using Result = Parts<decltype(function(0, v.part[0]...))>;
    if constexpr (kParts == 2) {
        return Result{{function(0, v.part[0]...), function(1, v.part[1]...)}};
    } else {
        return Result{{function(0, v.part[0]...), function(1, v.part[1]...), function(2, v.part[2]...),
                       function(3, v.part[3]...)}};
    }
}

template <class Part, class Element>
LOGITKERNELS_INLINE Part part_of(Element value) {
    return value - Part{};  // not value + Part{}, which would lose the sign of a zero
}

#define LOGITKERNELS_LANEWISE(name, Vector, expression)                                             \
    LOGITKERNELS_INLINE Vector name(const Vector& a, const Vector& b) {                             \
        return by_part([](int, auto x, auto y) LOGITKERNELS_LAMBDA { return expression; }, a, b);   \
    }
LOGITKERNELS_LANEWISE(_mm512_add_ps, __m512, x + y)
LOGITKERNELS_LANEWISE(_mm512_sub_ps, __m512, x - y)
LOGITKERNELS_LANEWISE(_mm512_mul_ps, __m512, x * y)
LOGITKERNELS_LANEWISE(_mm512_div_ps, __m512, x / y)
LOGITKERNELS_LANEWISE(_mm512_add_pd, __m512d, x + y)
LOGITKERNELS_LANEWISE(_mm512_sub_epi32, __m512i, (int_part)((uint_part)x - (uint_part)y))
LOGITKERNELS_LANEWISE(_mm512_sub_epi16, __m512i, (int_part)((ushort_part)x - (ushort_part)y))
LOGITKERNELS_LANEWISE(_mm512_and_si512, __m512i, x & y)
LOGITKERNELS_LANEWISE(_mm512_or_si512, __m512i, x | y)
LOGITKERNELS_LANEWISE(_mm512_xor_si512, __m512i, x ^ y)
// The result is the second operand when one is NaN or both are zero.
#ifdef LOGITKERNELS_AVX2
LOGITKERNELS_LANEWISE(_mm512_max_ps, __m512, (float_part)_mm256_max_ps(x, y))
LOGITKERNELS_LANEWISE(_mm512_min_ps, __m512, (float_part)_mm256_min_ps(x, y))
#else
LOGITKERNELS_LANEWISE(_mm512_max_ps, __m512, x > y ? x : y)
LOGITKERNELS_LANEWISE(_mm512_min_ps, __m512, x < y ? x : y)
#endif
#undef LOGITKERNELS_LANEWISE

LOGITKERNELS_INLINE __m512 _mm512_set1_ps(float value) {
    const float_part p = part_of<float_part>(value);
    return by_part([&](int) LOGITKERNELS_LAMBDA { return p; });
}
LOGITKERNELS_INLINE __m512i _mm512_set1_epi32(int32_t value) {
    const int_part p = part_of<int_part>(value);
    return by_part([&](int) LOGITKERNELS_LAMBDA { return p; });
}
LOGITKERNELS_INLINE __m512i _mm512_set1_epi16(int16_t value) {
    return by_part([&](int) LOGITKERNELS_LAMBDA { return (int_part)part_of<short_part>(value); });
}
LOGITKERNELS_INLINE __m512 _mm512_setzero_ps() { return {}; }
LOGITKERNELS_INLINE __m512d _mm512_setzero_pd() { return {}; }

LOGITKERNELS_INLINE __m512 _mm512_castsi512_ps(const __m512i& a) {
    return by_part([](int, int_part x) LOGITKERNELS_LAMBDA { return (float_part)x; }, a);
}
LOGITKERNELS_INLINE __m512i _mm512_castps_si512(const __m512& a) {
    return by_part([](int, float_part x) LOGITKERNELS_LAMBDA { return (int_part)x; }, a);
}
LOGITKERNELS_INLINE float _mm512_cvtss_f32(const __m512& a) { return a.part[0][0]; }

template <class Part>
LOGITKERNELS_INLINE Parts<Part> load_parts(const void* source) {
    return by_part([&](int p) LOGITKERNELS_LAMBDA {
        Part result;
        __builtin_memcpy(&result, static_cast<const char*>(source) + p * int(sizeof result), sizeof result);
        return result;
    });
}
template <class Part>
LOGITKERNELS_INLINE void store_parts(void* target, const Parts<Part>& values) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p)
        __builtin_memcpy(static_cast<char*>(target) + p * int(sizeof(Part)), &values.part[p], sizeof(Part));
}
LOGITKERNELS_INLINE __m512 _mm512_load_ps(const void* source) { return load_parts<float_part>(source); }
LOGITKERNELS_INLINE __m512i _mm512_load_si512(const void* source) { return load_parts<int_part>(source); }
LOGITKERNELS_INLINE __m512i _mm512_loadu_si512(const void* source) { return load_parts<int_part>(source); }
LOGITKERNELS_INLINE void _mm512_store_ps(void* target, const __m512& values) { store_parts(target, values); }
LOGITKERNELS_INLINE void _mm512_store_si512(void* target, const __m512i& values) { store_parts(target, values); }

LOGITKERNELS_INLINE float_part fused(float_part x, float_part y, float_part z) {
#if defined(LOGITKERNELS_AVX2)
    return (float_part)_mm256_fmadd_ps(x, y, z);
#else
    float_part result;
    for (int i = 0; i < kPartLanes; ++i) result[i] = std::fma(x[i], y[i], z[i]);
    return result;
#endif
}
LOGITKERNELS_INLINE __m512 _mm512_fmadd_ps(const __m512& a, const __m512& b, const __m512& c) {
    return by_part([](int, auto x, auto y, auto z) LOGITKERNELS_LAMBDA { return fused(x, y, z); }, a, b, c);
}
LOGITKERNELS_INLINE __m512 _mm512_fmsub_ps(const __m512& a, const __m512& b, const __m512& c) {
    return by_part([](int, auto x, auto y, auto z) LOGITKERNELS_LAMBDA { return fused(x, y, -z); }, a, b, c);
}
LOGITKERNELS_INLINE __m512 _mm512_fnmadd_ps(const __m512& a, const __m512& b, const __m512& c) {
    return by_part([](int, auto x, auto y, auto z) LOGITKERNELS_LAMBDA { return fused(-x, y, z); }, a, b, c);
}

// sum plus the products of both int16 of each lane.
LOGITKERNELS_INLINE __m512i _mm512_dpwssd_epi32(const __m512i& sum, const __m512i& a, const __m512i& b) {
    return by_part([](int, int_part s, int_part x, int_part y) LOGITKERNELS_LAMBDA {
#ifdef LOGITKERNELS_AVX2
        // Assembly, because GCC would keep the products of a whole loop in memory to add them up in a tree.
        const ::__m256i products = _mm256_madd_epi16((::__m256i)x, (::__m256i)y);
        asm("vpaddd %1, %0, %0" : "+x"(s) : "x"(products));
        return s;
#elif defined(__aarch64__)
        const int16x8_t first = vreinterpretq_s16_s32(x), second = vreinterpretq_s16_s32(y);
        const int32x4_t low = vmull_s16(vget_low_s16(first), vget_low_s16(second));
        return s + int_part(vpaddq_s32(low, vmull_high_s16(first, second)));
#else
        return s + (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
    }, sum, a, b);
}

LOGITKERNELS_INLINE __m512i _mm512_slli_epi32(const __m512i& a, int bits) {
    return by_part([&](int, int_part x) LOGITKERNELS_LAMBDA { return (int_part)((uint_part)x << bits); }, a);
}
LOGITKERNELS_INLINE __m512i _mm512_srli_epi32(const __m512i& a, unsigned bits) {
    return by_part([&](int, int_part x) LOGITKERNELS_LAMBDA { return (int_part)((uint_part)x >> int(bits)); }, a);
}
LOGITKERNELS_INLINE __m512i _mm512_srli_epi16(const __m512i& a, int bits) {
    return by_part([&](int, int_part x) LOGITKERNELS_LAMBDA { return (int_part)((ushort_part)x >> bits); }, a);
}
LOGITKERNELS_INLINE __m512i _mm512_srai_epi32(const __m512i& a, unsigned bits) {
    return by_part([&](int, int_part x) LOGITKERNELS_LAMBDA { return x >> int(bits); }, a);
}

LOGITKERNELS_INLINE __m512 _mm512_cvtepi32_ps(const __m512i& a) {
    return by_part([](int, int_part x) LOGITKERNELS_LAMBDA { return __builtin_convertvector(x, float_part); }, a);
}

// Rounds to the nearest integer, for |a| < 2^22; a result of zero has either sign.
LOGITKERNELS_INLINE __m512 _mm512_roundscale_ps(const __m512& a, int) {
    return by_part([](int, float_part x) LOGITKERNELS_LAMBDA {
#ifdef LOGITKERNELS_AVX2
        return (float_part)_mm256_round_ps(x, 8);
#else
        const float shift = 12582912.0f;  // 1.5 * 2^23: its units are ones
        return (x + shift) - shift;
#endif
    }, a);
}

// a 2^n for whole n of magnitude up to 252, rounded once: the product with the first factor is a normal
// number.
LOGITKERNELS_INLINE __m512 _mm512_scalef_ps(const __m512& a, const __m512& n) {
    return by_part([](int, float_part x, float_part y) LOGITKERNELS_LAMBDA {
        const int_part whole = __builtin_convertvector(y, int_part), half = whole >> 1;
        const auto power = [](int_part e) LOGITKERNELS_LAMBDA { return (float_part)((e + 127) << 23); };
        return x * power(half) * power(whole - half);
    }, a, n);
}

// Expands a mask to lanes of all ones or all zeros.
LOGITKERNELS_INLINE int_part lanes_of(__mmask16 mask, int p) {
#ifdef LOGITKERNELS_AVX2
    constexpr int_part bits = {1, 2, 4, 8, 16, 32, 64, 128};
#else
    constexpr int_part bits = {1, 2, 4, 8};
#endif
    return (part_of<int_part>(int32_t(mask) >> (p * kPartLanes)) & bits) == bits;
}
LOGITKERNELS_INLINE __mmask16 mask_of(const __m512i& lanes) {
#ifdef LOGITKERNELS_AVX2
    const auto bits = [&](int p) LOGITKERNELS_LAMBDA { return _mm256_movemask_ps((float_part)lanes.part[p]); };
    return __mmask16(bits(0) | bits(1) << 8);
#else
    int_part bits{};
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) bits |= lanes.part[p] & (int_part{1, 2, 4, 8} << (p * kPartLanes));
    return __mmask16(bits[0] | bits[1] | bits[2] | bits[3]);
#endif
}

template <class Vector>
LOGITKERNELS_INLINE Vector chosen(const Vector& otherwise, __mmask16 mask, const Vector& a) {
    return by_part([&](int p, auto x, auto y) LOGITKERNELS_LAMBDA { return lanes_of(mask, p) ? x : y; }, a, otherwise);
}
LOGITKERNELS_INLINE __m512 _mm512_mask_mov_ps(const __m512& otherwise, __mmask16 mask, const __m512& a) {
    return chosen(otherwise, mask, a);
}
LOGITKERNELS_INLINE __m512 _mm512_maskz_mov_ps(__mmask16 mask, const __m512& a) { return chosen(__m512{}, mask, a); }
LOGITKERNELS_INLINE __m512i _mm512_mask_mov_epi32(const __m512i& otherwise, __mmask16 mask, const __m512i& a) {
    return chosen(otherwise, mask, a);
}
LOGITKERNELS_INLINE __m512 _mm512_mask_max_ps(const __m512& otherwise, __mmask16 mask, const __m512& a, const __m512& b) {
    return chosen(otherwise, mask, _mm512_max_ps(a, b));
}
// Supports only _CMP_UNORD_Q.
LOGITKERNELS_INLINE __mmask16 _mm512_cmp_ps_mask(const __m512& a, const __m512& b, int) {
    return mask_of(by_part([](int, float_part x, float_part y) LOGITKERNELS_LAMBDA { return (x != x) | (y != y); }, a, b));
}
LOGITKERNELS_INLINE __mmask16 _mm512_mask_cmpgt_epi32_mask(__mmask16 mask, const __m512i& a, const __m512i& b) {
    return mask & mask_of(by_part([](int, int_part x, int_part y) LOGITKERNELS_LAMBDA { return x > y; }, a, b));
}

// Reduces halves, then halves of the half, and so on, as AVX-512 does.
template <class Function>
LOGITKERNELS_INLINE float reduced(const __m512& a, Function function) {
    typedef float quad __attribute__((vector_size(16)));
    quad q[4];
    __builtin_memcpy(q, &a, sizeof q);
    const quad x = function(function(q[0], q[2]), function(q[1], q[3]));
    const quad y = function(x, __builtin_shuffle(x, (__m128i){2, 3, 0, 1}));
    const quad z = function(y, __builtin_shuffle(y, (__m128i){1, 0, 3, 2}));
    return z[0];
}
LOGITKERNELS_INLINE float _mm512_reduce_add_ps(const __m512& a) {
    return reduced(a, [](auto x, auto y) LOGITKERNELS_LAMBDA { return x + y; });
}
LOGITKERNELS_INLINE float _mm512_reduce_max_ps(const __m512& a) {
    return reduced(a, [](auto x, auto y) LOGITKERNELS_LAMBDA { return x > y ? x : y; });
}
LOGITKERNELS_INLINE double _mm512_reduce_add_pd(const __m512d& a) {
    double d[8];
    __builtin_memcpy(d, &a, sizeof d);
    return ((d[0] + d[4]) + (d[2] + d[6])) + ((d[1] + d[5]) + (d[3] + d[7]));
}

// Conversions of eight floats to double precision.
LOGITKERNELS_INLINE Parts<float_part, kParts / 2> _mm512_castps512_ps256(const __m512& a) {
    Parts<float_part, kParts / 2> result;
    __builtin_memcpy(&result, &a, sizeof result);
    return result;
}
LOGITKERNELS_INLINE Parts<float_part, kParts / 2> _mm512_extractf32x8_ps(const __m512& a, int half) {
    Parts<float_part, kParts / 2> result;
    __builtin_memcpy(&result, &a.part[half * kParts / 2], sizeof result);
    return result;
}
LOGITKERNELS_INLINE __m512d _mm512_cvtps_pd(const Parts<float_part, kParts / 2>& a) {
    typedef float narrow_part __attribute__((vector_size(32 / kParts)));
    return by_part([&](int p) LOGITKERNELS_LAMBDA {
        narrow_part floats;
        __builtin_memcpy(&floats, reinterpret_cast<const char*>(&a) + p * int(sizeof floats), sizeof floats);
        return __builtin_convertvector(floats, double_part);
    });
}

LOGITKERNELS_INLINE __m128i _mm_loadu_si128(const __m128i* source) {
    __m128i result;
    __builtin_memcpy(&result, source, sizeof result);
    return result;
}
LOGITKERNELS_INLINE __m512i _mm512_castsi128_si512(const __m128i& a) {
#ifdef LOGITKERNELS_AVX2
    return {{(int_part)_mm256_zextsi128_si256((::__m128i)a), int_part{}}};
#else
    return {{a, int_part{}, int_part{}, int_part{}}};
#endif
}
// Supports only masks of one group of four lanes.
LOGITKERNELS_INLINE __m512i _mm512_mask_broadcast_i32x4(const __m512i& otherwise, __mmask16 mask, const __m128i& a) {
    return by_part([&](int p, int_part x) LOGITKERNELS_LAMBDA {
#ifdef LOGITKERNELS_AVX2
        if (mask >> (8 * p) & 1) return (int_part)_mm256_inserti128_si256((::__m256i)x, (::__m128i)a, 0);
        if (mask >> (8 * p + 4) & 1) return (int_part)_mm256_inserti128_si256((::__m256i)x, (::__m128i)a, 1);
        return x;
#else
        return mask >> (4 * p) & 1 ? (int_part)a : x;
#endif
    }, otherwise);
}

// Unpacks within each group of four lanes.
#ifdef LOGITKERNELS_AVX2
#define LOGITKERNELS_UNPACK(name, of_avx2, ...)                                                                \
    LOGITKERNELS_INLINE __m512i name(const __m512i& a, const __m512i& b) {                                     \
        return by_part([](int, auto x, auto y) LOGITKERNELS_LAMBDA {                                           \
            return (int_part)of_avx2((::__m256i)x, (::__m256i)y);                                              \
        }, a, b);                                                                                              \
    }
#else
#define LOGITKERNELS_UNPACK(name, of_avx2, ...)                                                                \
    LOGITKERNELS_INLINE __m512i name(const __m512i& a, const __m512i& b) {                                     \
        return by_part([](int, auto x, auto y) LOGITKERNELS_LAMBDA {                                           \
            return __builtin_shuffle(x, y, (int_part){__VA_ARGS__});                                           \
        }, a, b);                                                                                              \
    }
#endif
LOGITKERNELS_UNPACK(_mm512_unpacklo_epi32, _mm256_unpacklo_epi32, 0, 4, 1, 5)
LOGITKERNELS_UNPACK(_mm512_unpackhi_epi32, _mm256_unpackhi_epi32, 2, 6, 3, 7)
LOGITKERNELS_UNPACK(_mm512_unpacklo_epi64, _mm256_unpacklo_epi64, 0, 1, 4, 5)
LOGITKERNELS_UNPACK(_mm512_unpackhi_epi64, _mm256_unpackhi_epi64, 2, 3, 6, 7)
#undef LOGITKERNELS_UNPACK

// From here on: counterparts of what vector.h itself defines for AVX-512.

LOGITKERNELS_INLINE void keep(__m512& vector) {
#if defined(__x86_64__)
#define LOGITKERNELS_REGISTER "+x"
#else
#define LOGITKERNELS_REGISTER "+w"
#endif
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) asm("" : LOGITKERNELS_REGISTER(vector.part[p]));
#undef LOGITKERNELS_REGISTER
}

// Widens 16 elements of two bytes to lanes.
template <class Element>
LOGITKERNELS_INLINE __m512i widened(const Element* source) {
    return by_part([&](int p) LOGITKERNELS_LAMBDA {
#ifdef LOGITKERNELS_AVX2
        const ::__m128i elements = ::_mm_loadu_si128(reinterpret_cast<const ::__m128i*>(source + p * kPartLanes));
        return (int_part)(Element(-1) < 0 ? _mm256_cvtepi16_epi32(elements) : _mm256_cvtepu16_epi32(elements));
#else
        typedef Element narrow_part __attribute__((vector_size(32 / kParts)));
        narrow_part elements;
        __builtin_memcpy(&elements, source + p * kPartLanes, sizeof elements);
        return __builtin_convertvector(elements, int_part);
#endif
    });
}

LOGITKERNELS_INLINE __m512 load(const float* source, __mmask16 mask) {
    if (mask == 0xffff) return load_parts<float_part>(source);
    return by_part([&](int p) LOGITKERNELS_LAMBDA {
#ifdef LOGITKERNELS_AVX2
        return (float_part)_mm256_maskload_ps(source + p * kPartLanes, (::__m256i)lanes_of(mask, p));
#else
        float_part result{};
        for (int i = 0; i < kPartLanes; ++i)
            if (mask >> (p * kPartLanes + i) & 1) result[i] = source[p * kPartLanes + i];
        return result;
#endif
    });
}
LOGITKERNELS_INLINE void store(float* target, __mmask16 mask, const __m512& values) {
    if (mask == 0xffff) return store_parts(target, values);
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p)
#ifdef LOGITKERNELS_AVX2
        _mm256_maskstore_ps(target + p * kPartLanes, (::__m256i)lanes_of(mask, p), values.part[p]);
#else
        for (int i = 0; i < kPartLanes; ++i)
            if (mask >> (p * kPartLanes + i) & 1) target[p * kPartLanes + i] = values.part[p][i];
#endif
}

LOGITKERNELS_INLINE __m512 load(const uint16_t* source, __mmask16 mask) {
    uint16_t some[16];
    if (mask != 0xffff) {
        for (int i = 0; i < 16; ++i) some[i] = mask >> i & 1 ? source[i] : uint16_t(0);
        source = some;
    }
    return _mm512_castsi512_ps(_mm512_slli_epi32(widened(source), 16));
}

#ifdef LOGITKERNELS_AVX2
// bf16 are widened like pairs: the even elements go to the first register, the odd ones to the second.
LOGITKERNELS_INLINE __m512 load_shuffled(const float* source) { return load_parts<float_part>(source); }
LOGITKERNELS_INLINE __m512 load_shuffled(const uint16_t* source) {
    const ::__m256i pairs = _mm256_loadu_si256(reinterpret_cast<const ::__m256i*>(source));
    return {{(float_part)_mm256_slli_epi32(pairs, 16), (float_part)((int_part)pairs & int32_t(0xffff0000))}};
}
LOGITKERNELS_INLINE __m512 shuffled(const __m512& vector, float) { return vector; }
LOGITKERNELS_INLINE __m512 shuffled(const __m512& vector, uint16_t) {
    const auto of_lanes = [](::__m256 a) LOGITKERNELS_LAMBDA {
        return (float_part)_mm256_permute4x64_pd((::__m256d)a, 0xd8);
    };
    const ::__m256 low = (::__m256)vector.part[0], high = (::__m256)vector.part[1];
    return {{of_lanes(_mm256_shuffle_ps(low, high, 0x88)), of_lanes(_mm256_shuffle_ps(low, high, 0xdd))}};
}
LOGITKERNELS_INLINE __m512 unshuffled(const __m512& vector, float) { return vector; }
LOGITKERNELS_INLINE __m512 unshuffled(const __m512& vector, uint16_t) {
    const ::__m256 even = (::__m256)vector.part[0], odd = (::__m256)vector.part[1];
    const ::__m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    return {{(float_part)_mm256_permute2f128_ps(low, high, 0x20), (float_part)_mm256_permute2f128_ps(low, high, 0x31)}};
}
#endif

// Rounds to bf16 in the upper half of each lane: to nearest even, NaN quiet, float32 denormals to zero.
LOGITKERNELS_INLINE __m512i rounded_bits(const __m512& values) {
    return by_part([](int, float_part x) LOGITKERNELS_LAMBDA {
        const int_part bits = (int_part)x, magnitude = bits & 0x7fffffff;
        const int_part nearest = (int_part)((uint_part)bits + 0x7fff + ((uint_part)bits >> 16 & 1));
        const int_part quiet = magnitude > 0x7f800000 ? bits | 0x00400000 : nearest;
        return (magnitude < 0x00800000 ? bits & INT32_MIN : quiet) & int32_t(0xffff0000);
    }, values);
}
LOGITKERNELS_INLINE void store(uint16_t* target, __mmask16 mask, const __m512& values) {
    const __m512i bits = _mm512_srli_epi32(rounded_bits(values), 16);
    uint16_t narrow[16];
    uint16_t* place = mask == 0xffff ? target : narrow;
#ifdef LOGITKERNELS_AVX2
    const ::__m256i mixed = _mm256_packus_epi32((::__m256i)bits.part[0], (::__m256i)bits.part[1]);
    _mm256_storeu_si256(reinterpret_cast<::__m256i*>(place), _mm256_permute4x64_epi64(mixed, 0xd8));
#else
    typedef uint16_t narrow_part __attribute__((vector_size(8)));
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
        const narrow_part words = __builtin_convertvector(bits.part[p], narrow_part);
        __builtin_memcpy(place + p * kPartLanes, &words, sizeof words);
    }
#endif
    if (mask == 0xffff) return;
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) target[i] = narrow[i];
}

// An activation of a product that rounds to bf16, kept as the float32 to multiply.
struct Rounded {
    float value;
};
LOGITKERNELS_INLINE __m512 load(const Rounded* source, __mmask16 mask) { return load(&source->value, mask); }
LOGITKERNELS_INLINE void store(Rounded* target, __mmask16 mask, const __m512& values) {
    store(&target->value, mask, _mm512_castsi512_ps(rounded_bits(values)));
}

LOGITKERNELS_INLINE __m512i load_int16(const char* source) { return widened(reinterpret_cast<const int16_t*>(source)); }

// Stores whole numbers that fit in 16 bits.
LOGITKERNELS_INLINE void store_int16(int16_t* target, const __m512& values) {
#ifdef LOGITKERNELS_AVX2
    const ::__m256i low = _mm256_cvtps_epi32(values.part[0]), high = _mm256_cvtps_epi32(values.part[1]);
    const ::__m256i mixed = _mm256_packs_epi32(low, high);
    _mm256_storeu_si256(reinterpret_cast<::__m256i*>(target), _mm256_permute4x64_epi64(mixed, 0xd8));
#else
    for (int i = 0; i < 16; ++i) target[i] = int16_t(values.part[i / kPartLanes][i % kPartLanes]);
#endif
}

// Widens 32 bytes to int16.
LOGITKERNELS_INLINE __m512i load_int8(const char* source) {
    return by_part([&](int p) LOGITKERNELS_LAMBDA {
#ifdef LOGITKERNELS_AVX2
        const ::__m128i bytes = ::_mm_loadu_si128(reinterpret_cast<const ::__m128i*>(source) + p);
        return (int_part)_mm256_cvtepi8_epi16(bytes);
#else
        typedef int8_t byte_part __attribute__((vector_size(32 / kParts)));
        byte_part bytes;
        __builtin_memcpy(&bytes, source + p * int(sizeof bytes), sizeof bytes);
        return (int_part)__builtin_convertvector(bytes, short_part);
#endif
    });
}

// Widens 16 bytes to lanes.
template <class Byte>
LOGITKERNELS_INLINE __m512i widen_bytes(const char* source) {
    return by_part([&](int p) LOGITKERNELS_LAMBDA {
#ifdef LOGITKERNELS_AVX2
        const ::__m128i bytes = ::_mm_loadl_epi64(reinterpret_cast<const ::__m128i*>(source + p * kPartLanes));
        return (int_part)(Byte(-1) < 0 ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
        typedef Byte byte_part __attribute__((vector_size(16 / kParts)));
        byte_part bytes;
        __builtin_memcpy(&bytes, source + p * kPartLanes, sizeof bytes);
        return __builtin_convertvector(bytes, int_part);
#endif
    });
}
LOGITKERNELS_INLINE __m512i widen_uint8(const char* source) { return widen_bytes<uint8_t>(source); }
LOGITKERNELS_INLINE __m512i widen_int8(const char* source) { return widen_bytes<int8_t>(source); }

// Replaces each byte, which is below 16, by the table's entry.
LOGITKERNELS_INLINE __m512i look_up(const uint8_t (&table)[16], const __m512i& bytes) {
    return by_part([&](int, int_part x) LOGITKERNELS_LAMBDA {
        const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
#ifdef LOGITKERNELS_AVX2
        return (int_part)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256((::__m128i)entries), (::__m256i)x);
#else
        typedef uint8_t bytes_part __attribute__((vector_size(16)));
        return (int_part)__builtin_shuffle((bytes_part)entries, (bytes_part)x);
#endif
    }, bytes);
}

LOGITKERNELS_INLINE __m512 load_float16(const char* source) {
#ifdef LOGITKERNELS_AVX2
    return by_part([&](int p) LOGITKERNELS_LAMBDA {
        return (float_part)_mm256_cvtph_ps(::_mm_loadu_si128(reinterpret_cast<const ::__m128i*>(source) + p));
    });
#else
    return by_part([](int, int_part h) LOGITKERNELS_LAMBDA {
        const int_part exponent = h & 0x7c00, sign = (h & 0x8000) << 16;
        // Denormals are multiplied exactly into float32's range; infinities and NaN take its largest exponent.
        const int_part finite = (int_part)((float_part)((h & 0x7fff) << 13) * 0x1p112f);
        return (float_part)((exponent == 0x7c00 ? finite | 0x7f800000 : finite) | sign);
    }, widened(reinterpret_cast<const uint16_t*>(source)));
#endif
}

#undef LOGITKERNELS_LAMBDA

}  // namespace logitkernels
