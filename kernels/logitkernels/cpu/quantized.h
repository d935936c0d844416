// Linear layers on the block formats of GGUF files, without loss: every stored integer and scale is kept.
//
// A block is 32 weights along k with a scale d (and a minimum m): w = d q + m. The sum over a block is a sum
// over q x that is scaled once, in the same order for any number of rows:
//
//     sum_k w_k x_k = (sum_blocks m sum_k x_k) + sum_blocks d (sum_k q_k x_k)
//
// The product multiplies the integers q exactly. In the fma kinds the activations x are float32. In the dot
// kinds they are rounded to 16-bit integers with a power of two for every 32: 15 bits of the largest of them,
// where bfloat16 keeps 8 bits of each. bfloat16 would be finer only for blocks where one activation is
// hundreds of times the others and has a weight near zero. The sums over a block are then exact, whatever
// instructions compute them.
//
// A panel is 32 output features in two groups of 16. First come the minima of all blocks (Q4_1 only), float16
// m[k / 32][2][16]. Then follow, block by block, float16 d[2][16] and the integers of the first and the
// second group, one 32-bit lane per feature:
//
//     Q4_0, Q4_1:  4 vectors of 8 steps of k; nibble i of the lower half is step 2 i, of the upper half step
//     2 i + 1
//     Q8_0:        16 half vectors of 2 steps of k, [16 features][2] int8
//
// Bytes moved per weight: 0.5625 (Q4_0), 0.625 (Q4_1), 1.0625 (Q8_0).
#pragma once

#include "linear.h"

namespace logitkernels {

void multiply_quantized(const Linear& linear, const Activations& x, int64_t rows, float* out, int64_t ldo,
                        Epilogue epilogue);

}  // namespace logitkernels
