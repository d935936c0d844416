// Attention of some rows to one block of keys, and the merge of block results; see attention.cpp.
#pragma once

#include <algorithm>
#include <limits>

#include "fetcher.h"
#include "vector.h"

namespace logitkernels {

constexpr int64_t kBlockKeys = 128;

// Vectors of keys, or of a value, that `rows` rows take at a time: as many as keep the sums in registers.
constexpr int vectors_beside(int rows) {
    return rows * 4 <= kRegisterSums ? 4 : rows * 2 <= kRegisterSums ? 2 : 1;
}

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct Range {
    int64_t from;
    int64_t to;  // exclusive
    bool empty() const { return from >= to; }
};

// Running result of one row.
struct RowState {
    float maximum;
    float sum;
};

// Transposes four 32-bit columns of 16 rows, each row's 16 bytes at rows[i] + offset, to four vectors of 16
// rows. Gathering rows j, j + 4, j + 8, j + 12 while loading leaves only shuffles within 128-bit lanes. It
// needs few registers.
LOGITKERNELS_INLINE void transpose_columns(const char* const* rows, int64_t offset, __m512i (&columns)[4]) {
    __m512i r[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        auto piece = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + offset)); };
        r[j] = _mm512_castsi128_si512(piece(j));
        r[j] = _mm512_mask_broadcast_i32x4(r[j], 0x00f0, piece(j + 4));
        r[j] = _mm512_mask_broadcast_i32x4(r[j], 0x0f00, piece(j + 8));
        r[j] = _mm512_mask_broadcast_i32x4(r[j], 0xf000, piece(j + 12));
    }
    const __m512i low01 = _mm512_unpacklo_epi32(r[0], r[1]), low23 = _mm512_unpacklo_epi32(r[2], r[3]);
    const __m512i high01 = _mm512_unpackhi_epi32(r[0], r[1]), high23 = _mm512_unpackhi_epi32(r[2], r[3]);
    columns[0] = _mm512_unpacklo_epi64(low01, low23);
    columns[1] = _mm512_unpackhi_epi64(low01, low23);
    columns[2] = _mm512_unpacklo_epi64(high01, high23);
    columns[3] = _mm512_unpackhi_epi64(high01, high23);
}

LOGITKERNELS_INLINE void store_column(__m512i pairs, float* target, bf16) {
    _mm512_store_si512(target, _mm512_slli_epi32(pairs, 16));
    _mm512_store_si512(target + kBlockKeys, _mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000u))));
}

LOGITKERNELS_INLINE void store_column(__m512i values, float* target, float) { _mm512_store_si512(target, values); }

// Transposes 16 keys of `size` elements into columns of `target`, float32 [padded size][kBlockKeys].
template <class Element>
void transpose_keys(const Element* const* keys, int64_t size, float* target) {
    constexpr int64_t piece = 16 / sizeof(Element), per_column = 4 / sizeof(Element);
    const char* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i] = reinterpret_cast<const char*>(keys[i]);
    __m512i columns[4];
    const int64_t whole = size / piece * piece;
    for (int64_t d = 0; d < whole; d += piece) {
        transpose_columns(rows, d * int64_t(sizeof(Element)), columns);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) store_column(columns[c], target + (d + c * per_column) * kBlockKeys, Element());
    }
    if (whole == size) return;
    // The last elements are read from copies, so that no memory beyond a row is touched.
    Element ends[kLanes][piece] = {};
    for (int i = 0; i < kLanes; ++i) {
        std::copy_n(keys[i] + whole, size - whole, ends[i]);
        rows[i] = reinterpret_cast<const char*>(ends[i]);
    }
    transpose_columns(rows, 0, columns);
    for (int c = 0; c < 4; ++c) store_column(columns[c], target + (whole + c * per_column) * kBlockKeys, Element());
}

// sums[r][v] += factor(r) vector(v)
template <int R, int V, class Factor, class Vector>
LOGITKERNELS_INLINE void add_products(__m512 (&sums)[R][V], Factor factor, Vector vector) {
#ifdef LOGITKERNELS_AVX512
    __m512 x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = vector(v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const __m512 f = factor(r);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] = _mm512_fmadd_ps(f, x[v], sums[r][v]);
    }
#else
    // One vector at a time, with the factors read again for each: beside 6 sums of 16 lanes the registers
    // hold no more.
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
        asm volatile("" ::: "memory");
        __m512 x = vector(v);
        keep(x);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r][v] = _mm512_fmadd_ps(factor(r), x, sums[r][v]);
    }
#endif
}

// The keys of a block in groups of 16, element after element: in a transposed cache or in a copy.
template <class Element>
struct KeyGroups {
    const Element* groups[kBlockKeys / kLanes];
    int64_t stride;  // from an element to the next
};

// scores[r][key] = q_r . k_key, summed in the order of the head's dimensions.
template <int R, class Element>
void score(const float* query, int64_t size, const KeyGroups<Element>& keys, Range range, float* scores,
           Fetcher& fetcher) {
    constexpr int V = vectors_beside(R);
    const int64_t stride = keys.stride;
    for (int64_t group = range.from / kLanes / V * V; group * kLanes < range.to; group += V) {
        __m512 sums[R][V];
        const Element* columns[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            columns[v] = keys.groups[group + v];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sums[r][v] = _mm512_setzero_ps();
        }
        for (int64_t d = 0; d < size; ++d) {
            fetcher.beside<V>();
            add_products(
                sums, [&](int r) { return _mm512_set1_ps(query[r * size + d]); },
                [&](int v) {
                    __m512 k = load_shuffled(columns[v]);
                    columns[v] += stride;
                    keep(k);
                    return k;
                });
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v)
                _mm512_store_ps(scores + r * kBlockKeys + (group + v) * kLanes, unshuffled(sums[r][v], Element()));
    }
}

// The values of a block, widened in advance because many rows use them.
struct WidenedValues {
    using Element = float;
    const float* values;  // [kBlockKeys][stride]
    int64_t stride;
    const float* row(int64_t key) const { return values + key * stride; }
};

// The values of a block, read in place from the cache. Their size is a multiple of 16.
template <class CacheElement>
struct CachedValues {
    using Element = CacheElement;
    const Element* const* rows;
    const Element* row(int64_t key) const { return rows[key]; }
};

// sums[r][d] += weights[r][key] * values[key][d] over keys in ascending order, V vectors of d at a time.
template <int R, int V, class Values>
void weigh_columns(const float* weights, const Values& values, int64_t d, Range keys, float* sums, int64_t stride,
                   Fetcher& fetcher) {
    using Element = typename Values::Element;
    __m512 s[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) s[r][v] = shuffled(_mm512_load_ps(sums + r * stride + d + v * kLanes), Element());
    for (int64_t key = keys.from; key < keys.to; ++key) {
        fetcher.beside<V>();
        const Element* row = values.row(key) + d;
        add_products(
            s, [&](int r) { return _mm512_set1_ps(weights[r * kBlockKeys + key]); },
            [&](int v) { return load_shuffled(row + v * kLanes); });
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            _mm512_store_ps(sums + r * stride + d + v * kLanes, unshuffled(s[r][v], Element()));
}

template <int R, class Values>
void weigh(const float* weights, const Values& values, Range keys, float* sums, int64_t stride,
           Fetcher& fetcher) {
    constexpr int V = vectors_beside(R);
    int64_t d = 0;
    for (; d + V * kLanes <= stride; d += V * kLanes) weigh_columns<R, V>(weights, values, d, keys, sums, stride, fetcher);
    switch ((stride - d) / kLanes) {
        case 3: return weigh_columns<R, std::min(3, V)>(weights, values, d, keys, sums, stride, fetcher);
        case 2: return weigh_columns<R, std::min(2, V)>(weights, values, d, keys, sums, stride, fetcher);
        case 1: return weigh_columns<R, 1>(weights, values, d, keys, sums, stride, fetcher);
        default: return;
    }
}

// Turns the scores of one row into exp(score - maximum); returns the maximum and the sum.
inline RowState soften(float* scores, Range keys, float softcap) {
    const int64_t first = keys.from / kLanes, last = ceil_div(keys.to, kLanes);
    const __m512 cap = _mm512_set1_ps(softcap), minus_infinity = _mm512_set1_ps(kMinusInfinity);
    __m512 maximum = minus_infinity;
    for (int64_t g = first; g < last; ++g) {
        const __mmask16 mask = lane_mask(keys.to - g * kLanes) & ~lane_mask(keys.from - g * kLanes);
        __m512 s = _mm512_load_ps(scores + g * kLanes);
        if (softcap > 0) s = softcapped(s, cap);
        s = _mm512_mask_mov_ps(minus_infinity, mask, s);
        _mm512_store_ps(scores + g * kLanes, s);
        maximum = _mm512_max_ps(maximum, s);
    }
    const float top = _mm512_reduce_max_ps(maximum);
    __m512 sums = _mm512_setzero_ps();
    for (int64_t g = first; g < last; ++g) {
        __m512 p = exponential(_mm512_sub_ps(_mm512_load_ps(scores + g * kLanes), _mm512_set1_ps(top)));
        _mm512_store_ps(scores + g * kLanes, p);
        sums = _mm512_add_ps(sums, p);
    }
    return {top, _mm512_reduce_add_ps(sums)};
}

inline void merge(RowState& state, float* output, const RowState& block, const float* block_output, int64_t size) {
    const float maximum = std::max(state.maximum, block.maximum);
    const __m512 old_factor = exponential(_mm512_set1_ps(state.maximum - maximum));
    const __m512 new_factor = exponential(_mm512_set1_ps(block.maximum - maximum));
    for (int64_t d = 0; d < size; d += kLanes) {
        __m512 scaled = _mm512_mul_ps(_mm512_load_ps(output + d), old_factor);
        _mm512_store_ps(output + d, _mm512_fmadd_ps(_mm512_load_ps(block_output + d), new_factor, scaled));
    }
    state.sum = state.sum * _mm512_cvtss_f32(old_factor) + block.sum * _mm512_cvtss_f32(new_factor);
    state.maximum = maximum;
}

}  // namespace logitkernels
