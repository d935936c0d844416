// Vector helpers shared by every kernel.
//
// Batch invariance rests on two rules that all files keep. First, the sources are compiled with
// -ffp-contract=off: a multiply and an add are fused only where an intrinsic says so. Otherwise the compiler
// might decide differently in two code paths. Second, each output element has one order of summation,
// whatever tile computes it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

// For small functions with arrays of vectors that must stay in registers.
#define LOGITKERNELS_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define LOGITKERNELS_AVX512
#include <immintrin.h>
#else
#include "portable.h"
#endif

namespace logitkernels {

using bf16 = uint16_t;

constexpr int kLanes = 16;

// Sums of 16 lanes that a tile may keep in registers beside the operands that it adds to them.
#ifdef LOGITKERNELS_AVX512
constexpr int kRegisterSums = 24;
#else
constexpr int kRegisterSums = 6;
#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The mask of the lanes that exist when `remaining` elements are left.
inline __mmask16 lane_mask(int64_t remaining) {
    return remaining >= kLanes ? __mmask16(0xffff) : __mmask16((1u << (remaining > 0 ? remaining : 0)) - 1);
}

struct FreeDeleter {
    void operator()(void* pointer) const { std::free(pointer); }
};

template <class T>
using Buffer = std::unique_ptr<T[], FreeDeleter>;

// Allocates uninitialised memory on a cache line boundary.
template <class T>
Buffer<T> allocate(int64_t count) {
    size_t bytes = size_t(round_up(count * int64_t(sizeof(T)) + 1, 64));
    void* pointer = std::aligned_alloc(64, bytes);
    if (pointer == nullptr) std::abort();
    return Buffer<T>(static_cast<T*>(pointer));
}

// Prefetches a cache line into the second-level cache. Written as assembly because GCC considers a function
// that only prefetches to have no effect and drops the call.
inline void prefetch(const void* address) {
#if defined(__x86_64__)
    asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(address)));
#else
    __builtin_prefetch(address, 0, 2);
#endif
}

// Whether memory that this thread alone reads once, soon, is best prefetched into the first-level cache alone: so
// little stays there beside the data that is read meanwhile. AMD's second level hands on to the third what it drops,
// and a line would be moved three times. Intel's first level has too few misses in flight: 5 GB/s a core, of 14.
inline bool fits_first_level(int64_t bytes) {
#if defined(__x86_64__)
    if (!__builtin_cpu_is("amd")) return false;
#endif
    return bytes <= 20 * 1024;
}

// Prefetches a cache line into the first-level cache and no further.
inline void prefetch_once(const void* address) {
#if defined(__x86_64__)
    asm volatile("prefetchnta %0" : : "m"(*static_cast<const char*>(address)));
#else
    __builtin_prefetch(address, 0, 0);
#endif
}

// Returns the same address in a form that GCC cannot track, so that memory is read again instead of kept in a
// register.
LOGITKERNELS_INLINE const char* reread(const char* address) {
    asm("" : "+r"(address));
    return address;
}

#ifdef LOGITKERNELS_AVX512

// Keeps a loaded vector in a register. GCC otherwise repeats the load as an operand of every instruction that
// uses it.
LOGITKERNELS_INLINE void keep(__m512& vector) { asm("" : "+v"(vector)); }

// bf16 is the upper half of a float32, so that widening is exact.
inline __m512 widen(__m256i values) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16)); }

// Rounds to nearest even, quiets NaN, flushes float32 denormals to zero.
inline __m256i narrow(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

inline __m512 load(const float* source, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, source); }
inline __m512 load(const bf16* source, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, source)); }
inline void store(float* target, __mmask16 mask, __m512 values) { _mm512_mask_storeu_ps(target, mask, values); }
inline void store(bf16* target, __mmask16 mask, __m512 values) { _mm256_mask_storeu_epi16(target, mask, narrow(values)); }

// An activation of a product that rounds to bf16.
using Rounded = bf16;

LOGITKERNELS_INLINE __m512i load_int16(const char* source) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}

// Stores whole numbers that fit in 16 bits.
LOGITKERNELS_INLINE void store_int16(int16_t* target, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(values)));
}

// Widen 16 bytes to lanes.
LOGITKERNELS_INLINE __m512i widen_uint8(const char* source) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
LOGITKERNELS_INLINE __m512i widen_int8(const char* source) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}

// Replaces each byte, which is below 16, by the table's entry.
LOGITKERNELS_INLINE __m512i look_up(const uint8_t (&table)[16], __m512i bytes) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), bytes);
}

LOGITKERNELS_INLINE __m512 load_float16(const char* source) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}

#endif

// Loads 16 elements in the order of lanes that is cheapest to widen to, and converts vectors to that order
// and back.
#ifndef LOGITKERNELS_AVX2
template <class Element>
LOGITKERNELS_INLINE __m512 load_shuffled(const Element* source) {
    return load(source, 0xffff);
}
template <class Element>
LOGITKERNELS_INLINE __m512 shuffled(const __m512& vector, Element) {
    return vector;
}
template <class Element>
LOGITKERNELS_INLINE __m512 unshuffled(const __m512& vector, Element) {
    return vector;
}
#endif

// exp(x) within 2 units in the last place; exp(0) is exactly 1 and exp(-inf) exactly 0.
// x = n ln 2 + r with |r| <= ln 2 / 2, then 2^n times the Taylor polynomial of degree 7 (its remainder is below 6e-9).
inline __m512 exponential(__m512 x) {
    // max and min return their second operand when one is NaN, so NaN passes through.
    x = _mm512_max_ps(_mm512_set1_ps(-105.0f), x);
    x = _mm512_min_ps(_mm512_set1_ps(89.0f), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);  // ln 2 rounded to 16 bits: its product with n is exact
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);       // the rest of ln 2
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// The absolute error is about 1e-7, enough for a softcap.
inline __m512 hyperbolic_tangent(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f);
    __m512 e = exponential(_mm512_add_ps(x, x));
    return _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, one)));
}

// cap * tanh(x / cap)
inline __m512 softcapped(__m512 x, __m512 cap) { return _mm512_mul_ps(cap, hyperbolic_tangent(_mm512_div_ps(x, cap))); }

}  // namespace logitkernels
