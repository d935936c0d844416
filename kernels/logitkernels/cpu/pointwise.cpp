#include "pointwise.h"
#include "team.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace logitkernels {
namespace {

template <class Out>
void norm_row(const float* x, const float* weight, float eps, int64_t size, Out* out) {
    __m512 scale = _mm512_set1_ps(inverse_rms(x, size, eps));
    for (int64_t i = 0; i < size; i += kLanes) {
        __mmask16 mask = lane_mask(size - i);
        store(out + i, mask, _mm512_mul_ps(_mm512_mul_ps(load(x + i, mask), scale), load(weight + i, mask)));
    }
}

// x / (1 + exp(-z)). For silu z is x. For gelu it is 2 u, as (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), where
// u = sqrt(2 / pi) (x + 0.044715 x^3); see Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016).
template <Gate gate>
inline __m512 gated(__m512 x) {
    __m512 negated;
    if constexpr (gate == Gate::kSilu) {
        negated = _mm512_sub_ps(_mm512_setzero_ps(), x);
    } else {
        const __m512 first = _mm512_set1_ps(-1.5957691216f), third = _mm512_set1_ps(-0.071354816f);
        negated = _mm512_mul_ps(x, _mm512_fmadd_ps(_mm512_mul_ps(x, x), third, first));
    }
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(negated)));
}

template <Gate gate, class Out>
void gate_and_mul_columns(const float* gates, const float* ups, int64_t first, int64_t last, Out* out) {
    for (int64_t i = first; i < last; i += kLanes) {
        const __mmask16 mask = lane_mask(last - i);
        store(out + i, mask, _mm512_mul_ps(gated<gate>(load(gates + i, mask)), load(ups + i, mask)));
    }
}

// The dot product reads the pair of an odd row's last element, so that it must be zero.
inline void close_row(Rounded* row, int64_t size) {
    if (size % 2) row[size] = {};
}

template <Gate gate>
void gate_and_mul_rows(const float* gate_up, int64_t rows, int64_t size, const Activations& out) {
    const int64_t parts = ceil_div(size, kColumnsPerItem);
    share(rows * parts, [&](int64_t item) {
        const int64_t row = item / parts, first = item % parts * kColumnsPerItem;
        const int64_t last = std::min(first + kColumnsPerItem, size);
        const float *gates = gate_up + row * 2 * size, *ups = gates + size;
        if (out.rounded()) {
            Rounded* target = static_cast<Rounded*>(out.data) + row * out.stride;
            gate_and_mul_columns<gate>(gates, ups, first, last, target);
            if (last == size) close_row(target, size);
        } else {
            gate_and_mul_columns<gate>(gates, ups, first, last, static_cast<float*>(out.data) + row * out.stride);
        }
        finish_columns(out, row, first, last);
    });
}

}  // namespace

float inverse_rms(const float* x, int64_t size, float eps) {
    __m512 sums = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += kLanes) {
        __m512 values = load(x + i, lane_mask(size - i));
        sums = _mm512_fmadd_ps(values, values, sums);
    }
    return 1.0f / std::sqrt(_mm512_reduce_add_ps(sums) / float(size) + eps);
}

void rms_norm(const float* x, int64_t ldx, const float* weight, float eps, int64_t rows, int64_t size,
              const Activations& out) {
    share(rows, [&](int64_t row) {
        if (out.rounded()) {
            Rounded* target = static_cast<Rounded*>(out.data) + row * out.stride;
            norm_row(x + row * ldx, weight, eps, size, target);
            close_row(target, size);
        } else {
            norm_row(x + row * ldx, weight, eps, size, static_cast<float*>(out.data) + row * out.stride);
        }
        finish_columns(out, row, 0, size);
    });
}

void add_rms_norm(const float* x, int64_t ldx, const float* weight, float eps, int64_t rows, int64_t size, float* out) {
    share(rows, [&](int64_t row) {
        const float* source = x + row * ldx;
        float* target = out + row * size;
        const __m512 scale = _mm512_set1_ps(inverse_rms(source, size, eps));
        for (int64_t i = 0; i < size; i += kLanes) {
            const __mmask16 mask = lane_mask(size - i);
            const __m512 normed = _mm512_mul_ps(_mm512_mul_ps(load(source + i, mask), scale), load(weight + i, mask));
            store(target + i, mask, _mm512_add_ps(load(target + i, mask), normed));
        }
    });
}

void norm_head(float* x, const float* weight, float eps, int64_t size) { norm_row(x, weight, eps, size, x); }

void gate_and_mul(Gate gate, const float* gate_up, int64_t rows, int64_t size, const Activations& out) {
    if (gate == Gate::kSilu)
        gate_and_mul_rows<Gate::kSilu>(gate_up, rows, size, out);
    else
        gate_and_mul_rows<Gate::kGelu>(gate_up, rows, size, out);
}

void rotate_head(const float* x, const float* cos, const float* sin, int64_t rotary, int64_t size, float* out) {
    const int64_t half = rotary / 2;
    for (int64_t i = 0; i < half; i += kLanes) {
        __mmask16 mask = lane_mask(half - i);
        __m512 first = load(x + i, mask), second = load(x + half + i, mask);
        __m512 c = load(cos + i, mask), s = load(sin + i, mask);
        store(out + i, mask, _mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s)));
        store(out + half + i, mask, _mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s)));
    }
    if (out != x) std::memcpy(out + rotary, x + rotary, size_t(size - rotary) * sizeof(float));
}

template <class Element>
static void store_elements(const float* x, int64_t size, Element* target, int64_t stride) {
    for (int64_t i = 0; i < size; i += kLanes) {
        const __mmask16 mask = lane_mask(size - i);
        if (stride == 1) {
            store(target + i, mask, load(x + i, mask));
            continue;
        }
        Element elements[kLanes];
        store(elements, 0xffff, load(x + i, mask));
        for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, size - i); ++lane) target[(i + lane) * stride] = elements[lane];
    }
}

void store_head(const float* x, int64_t size, const Cache& cache, int64_t slot, int64_t head) {
    const int64_t offset = slot / cache.block_size * cache.block_stride + head * cache.head_stride +
                           slot % cache.block_size * cache.token_stride;
    if (cache.is_bf16)
        store_elements(x, size, static_cast<bf16*>(cache.data) + offset, cache.element_stride);
    else
        store_elements(x, size, static_cast<float*>(cache.data) + offset, cache.element_stride);
}

}  // namespace logitkernels

using namespace logitkernels;

extern "C" {

void logitkernels_rms_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t size, float* out,
                           int threads) {
    in_team(threads, [&] { rms_norm(x, size, weight, eps, rows, size, Activations{out, size}); });
}

void logitkernels_gate_and_mul(Gate gate, const float* gate_up, int64_t rows, int64_t size, float* out, int threads) {
    in_team(threads, [&] { gate_and_mul(gate, gate_up, rows, size, Activations{out, size}); });
}

void logitkernels_rope(const float* x, const float* cos, const float* sin, int64_t tokens, int64_t heads, int64_t size,
                       int64_t rotary, float* out, int threads) {
#pragma omp parallel for num_threads(threads) collapse(2)
    for (int64_t token = 0; token < tokens; ++token)
        for (int64_t head = 0; head < heads; ++head)
            rotate_head(x + (token * heads + head) * size, cos + token * rotary, sin + token * rotary, rotary, size,
                        out + (token * heads + head) * size);
}

void logitkernels_store(const float* x, int64_t tokens, int64_t heads, int64_t size, const Cache* cache,
                        const int64_t* slots, int threads) {
#pragma omp parallel for num_threads(threads) collapse(2)
    for (int64_t token = 0; token < tokens; ++token)
        for (int64_t head = 0; head < heads; ++head)
            store_head(x + (token * heads + head) * size, size, *cache, slots[token], head);
}

}  // extern "C"
