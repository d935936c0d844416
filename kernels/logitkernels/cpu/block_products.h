// Products of a block's integers and activations.
#pragma once

#include <type_traits>
#include <utility>

#include "block_formats.h"

namespace logitkernels {

// Rows of activations in the type that a product multiplies.
template <class Element>
struct Inputs {
    const Element* x;
    int64_t stride;
    int64_t blocks, parts;  // of a row
    const float* part_sums;
    const float* block_scales;  // of integers
    const int32_t* integer_sums;
};

template <class Element>
Inputs<Element> from_row(Inputs<Element> in, int64_t row) {
    in.x += row * in.stride;
    if (in.part_sums != nullptr) in.part_sums += row * in.parts;
    if (in.block_scales != nullptr) {
        in.block_scales += row * in.blocks;
        in.integer_sums += row * in.parts;
    }
    return in;
}

constexpr int kPairs = kBlock / 2;

// Rows that are multiplied by a panel as it is, where a scratch panel is the other way. Each number of rows and each
// kind of integers have their own code, and vectors in four registers make it long to compile.
#if defined(LOGITKERNELS_AVX512) || defined(LOGITKERNELS_AVX2)
constexpr int kFusedRows = 4;
#else
constexpr int kFusedRows = 2;
#endif

// Calls step<P>() for the N pairs from P = First on.
template <int First, int N, class Step>
LOGITKERNELS_INLINE void for_each_pair(Step step) {
    [&]<int... P>(std::integer_sequence<int, P...>) __attribute__((always_inline)) {
        (step.template operator()<First + P>(), ...);
    }(std::make_integer_sequence<int, N>());
}

// Adds part H of kParts of a block of G groups of 16 features, pair by pair.
template <class Product, int kParts, int H, class Integers, int G, int R>
LOGITKERNELS_INLINE void add_pairs(const Integers& q, const char* integers, const typename Product::Element* x,
                                   int64_t stride, typename Product::Sum (&sums)[G][R]) {
    constexpr int pairs = kPairs / kParts;
    for_each_pair<H * pairs, pairs>([&]<int P>() __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g)
            Product::template add_packed<P>(q, integers + g * Integers::integer_bytes, x + 2 * P, stride, sums[g]);
    });
}

// A product multiplies integers q by activations x. `inputs` returns the activations that it multiplies. A
// part's sums for 16 features are a Sum, which `scaled` turns into float32. `sum_part` unpacks the integers where
// it uses them. A product that unpacks pairs can instead unpack them into a scratch panel for many rows.

// Sums over a part of integers are exact in int32, whatever instructions compute them and in whatever order.
struct Dot {
    using Element = int16_t;
    using Sum = __m512i;

    static int64_t row_bytes(const Activations&, int64_t k) { return k * int64_t(sizeof(int16_t)); }

    template <class Integers>
    static Inputs<int16_t> inputs(const Activations& x, int64_t k, int parts) {
        const int64_t blocks = k / kBlock;
        const ActivationBlocks& all = x.blocks;
        return {all.integers[Integers::order], k, blocks, blocks * parts, all.sums[parts - 1], all.scales,
                all.integer_sums[parts - 1]};
    }
    static LOGITKERNELS_INLINE __m512 scaled(const __m512i& sum, const Inputs<int16_t>& in, int64_t block) {
        return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(in.block_scales[block]));
    }

    // What the sums of part s of row r have too much, if integers are stored `offset` above their values.
    static LOGITKERNELS_INLINE __m512i excess(int offset, const Inputs<int16_t>& in, int r, int64_t s) {
        return _mm512_set1_epi32(offset * in.integer_sums[r * in.parts + s]);
    }
};

// Multiplies pairs of int16.
struct PairDot : Dot {
    static constexpr bool has_scratch = true;
    static constexpr int fused_rows = kFusedRows;
    static constexpr int64_t unpacked_bytes = 64;
    // A lone row has too few sums in one group to hide the latency of a multiply-add.
    template <int R>
    static constexpr int groups_together = R == 1 ? kVectors : 1;

    template <int kParts, int H, class Integers, int G, int R>
    static LOGITKERNELS_INLINE void sum_part(const Integers& q, const char* integers, const Inputs<int16_t>& in, int64_t b,
                                             __m512i (&sums)[G][R]) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const __m512i first = excess(-q.offset, in, r, b * kParts + H);
#pragma GCC unroll 2
            for (int g = 0; g < G; ++g) sums[g][r] = first;
        }
        add_pairs<PairDot, kParts, H>(q, integers, in.x + b * kBlock, in.stride, sums);
    }
    template <int P, class Integers>
    static LOGITKERNELS_INLINE void unpack(const Integers& q, const char* integers, char* scratch) {
        const __m512i offset = _mm512_set1_epi16(int16_t(q.offset));
        _mm512_store_si512(scratch, _mm512_sub_epi16(q.template raw<P>(integers), offset));
    }
    template <int P, class Integers, int R>
    static LOGITKERNELS_INLINE void add_packed(const Integers& q, const char* integers, const int16_t* x, int64_t stride,
                                               __m512i (&sums)[R]) {
        add<R>(q.template raw<P>(integers), x, stride, sums);
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
};

#ifdef LOGITKERNELS_AVX512
// Multiplies quads of bytes, the activations' upper bytes first. That takes as many multiplications as pairs,
// but unpacking nibbles to bytes takes half the instructions of unpacking to int16. They are so few that a
// scratch panel is not worth it.
struct QuadDot : Dot {
    static constexpr bool has_scratch = false;
    static constexpr int fused_rows = 8;
    template <int R>
    static constexpr int groups_together = kVectors;

    template <int kParts, int H, class Integers, int G, int R>
    static LOGITKERNELS_INLINE void sum_part(const Integers& q, const char* integers, const Inputs<int16_t>& in, int64_t b,
                                             __m512i (&sums)[G][R]) {
        static_assert(kParts == 1);
        const char* upper = reinterpret_cast<const char*>(in.x + b * kBlock);
        const char* lower = upper + kBlock;
        const int64_t stride = in.stride * int64_t(sizeof(int16_t));
        if constexpr (G * R <= 8) {
            // The registers hold the sums of both bytes, so that integers are unpacked once for both.
            __m512i parts[2][G][R] = {};
            if (q.quad_offset() != 0) {
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                    for (int g = 0; g < G; ++g) parts[1][g][r] = excess(-q.quad_offset(), in, r, b);
            }
            add_quads(q, integers, {upper, lower}, stride, parts);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int g = 0; g < G; ++g)
                    sums[g][r] = _mm512_add_epi32(_mm512_slli_epi32(parts[0][g][r], 8), parts[1][g][r]);
        } else {
            __m512i part[1][G][R] = {};
            add_quads(q, integers, {upper}, stride, part);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int g = 0; g < G; ++g)
                    part[0][g][r] = _mm512_sub_epi32(_mm512_slli_epi32(part[0][g][r], 8), excess(q.quad_offset(), in, r, b));
            add_quads(q, integers, {lower}, stride, part);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int g = 0; g < G; ++g) sums[g][r] = part[0][g][r];
        }
    }

  private:
    // sums[p][g][r] += integers of group g times the bytes of row r at x[p]
    template <class Integers, int P, int G, int R>
    static LOGITKERNELS_INLINE void add_quads(const Integers& q, const char* integers, const char* const (&x)[P], int64_t stride,
                                              __m512i (&sums)[P][G][R]) {
        [&]<int... Q>(std::integer_sequence<int, Q...>) __attribute__((always_inline)) {
            (add_quad<Q>(q, integers, x, stride, sums), ...);
        }(std::make_integer_sequence<int, kBlock / 4>());
    }
    template <int Q, class Integers, int P, int G, int R>
    static LOGITKERNELS_INLINE void add_quad(const Integers& q, const char* integers, const char* const (&x)[P], int64_t stride,
                                             __m512i (&sums)[P][G][R]) {
        __m512i quads[G];
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g) {
            quads[g] = q.template quad<Q>(integers + g * Integers::integer_bytes);
            asm("" : "+v"(quads[g]));  // unpack once, not for every row
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) {
                int32_t quad;
                __builtin_memcpy(&quad, x[p] + r * stride + 4 * Q, sizeof quad);
                const __m512i factor = _mm512_set1_epi32(quad);
#pragma GCC unroll 2
                for (int g = 0; g < G; ++g) sums[p][g][r] = _mm512_dpbusd_epi32(sums[p][g][r], quads[g], factor);
            }
    }
};

template <class Integers>
using DotOf = std::conditional_t<Integers::has_quads, QuadDot, PairDot>;
#else
template <class Integers>
using DotOf = PairDot;
#endif

// Multiplies one step at a time, in float32.
struct Fma {
    using Element = float;
    using Sum = __m512;

    static constexpr bool has_scratch = true;
    static constexpr int fused_rows = kFusedRows;
    static constexpr int64_t unpacked_bytes = 128;
    template <int R>
    static constexpr int groups_together = kRegisterSums == 6 && R == 1 ? kVectors : 1;

    static int64_t row_bytes(const Activations& x, int64_t) { return x.stride * int64_t(sizeof(float)); }

    template <class>
    static Inputs<float> inputs(const Activations& x, int64_t k, int parts) {
        const int64_t blocks = k / kBlock;
        const float* sums = x.blocks.sums[parts - 1];
        return {static_cast<const float*>(x.data), x.stride, blocks, blocks * parts, sums, nullptr, nullptr};
    }
    static LOGITKERNELS_INLINE __m512 scaled(const __m512& sum, const Inputs<float>&, int64_t) { return sum; }

    template <int kParts, int H, class Integers, int G, int R>
    static LOGITKERNELS_INLINE void sum_part(const Integers& q, const char* integers, const Inputs<float>& in, int64_t b,
                                             __m512 (&sums)[G][R]) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int g = 0; g < G; ++g) sums[g][r] = _mm512_setzero_ps();
        add_pairs<Fma, kParts, H>(q, integers, in.x + b * kBlock, in.stride, sums);
    }
    template <int P, class Integers>
    static LOGITKERNELS_INLINE void unpack(const Integers& q, const char* integers, char* scratch) {
        _mm512_store_ps(scratch, q.template even<P>(integers));
        _mm512_store_ps(scratch + 64, q.template odd<P>(integers));
    }
    template <int P, class Integers, int R>
    static LOGITKERNELS_INLINE void add_packed(const Integers& q, const char* integers, const float* x, int64_t stride,
                                               __m512 (&sums)[R]) {
        const __m512 even = q.template even<P>(integers), odd = q.template odd<P>(integers);
        add<R>(even, x, stride, sums);
        add<R>(odd, x + 1, stride, sums);
    }
    // Only one of the two steps is in registers at a time.
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

}  // namespace logitkernels
