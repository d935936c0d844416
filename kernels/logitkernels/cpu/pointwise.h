// Operations between the linear layers: norms, rotary embedding, the gated activation, writing keys and
// values.
//
// Like all functions that are not extern "C", the ones on rows share their work among the threads of the
// enclosing parallel region and end in a barrier.
#pragma once

#include "linear.h"
#include "vector.h"

namespace logitkernels {

// 1 / sqrt(mean(x^2) + eps) of one row: 16 running sums in the order of the row, then a fixed tree.
float inverse_rms(const float* x, int64_t size, float eps);

// x / rms(x) * weight: [rows, size] float32 into `out`.
void rms_norm(const float* x, int64_t ldx, const float* weight, float eps, int64_t rows, int64_t size,
              const Activations& out);

// out += x / rms(x) * weight: [rows, size] float32.
void add_rms_norm(const float* x, int64_t ldx, const float* weight, float eps, int64_t rows, int64_t size, float* out);

// rms_norm of one row of one head, in place.
void norm_head(float* x, const float* weight, float eps, int64_t size);

// Activation of a gate. Mirrored by library.py.
enum class Gate : int64_t {
    kSilu = 0,
    kGelu = 1,  // by the tanh approximation
};

// gate(first half) * second half: gate_up [rows, 2 size] float32 into `out` [rows, size].
void gate_and_mul(Gate gate, const float* gate_up, int64_t rows, int64_t size, const Activations& out);

// Rotates one head x [size] by cos and sin [rotary] into `out`, which may be x.
void rotate_head(const float* x, const float* cos, const float* sin, int64_t rotary, int64_t size, float* out);

// A cache [num_blocks, kv_heads, block_size, D]; strides are in elements. The elements of a token are
// neighbours. In a transposed cache of keys the tokens of a block are neighbours instead, and their number is
// a multiple of 16.
struct Cache {
    void* data;
    int64_t is_bf16;
    int64_t block_stride;
    int64_t head_stride;
    int64_t token_stride;
    int64_t element_stride;
    int64_t block_size;

    bool is_transposed() const { return element_stride != 1; }
};

// Writes one head's vector x [size] to the slot of the cache.
void store_head(const float* x, int64_t size, const Cache& cache, int64_t slot, int64_t head);

}  // namespace logitkernels
