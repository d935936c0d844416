// Linear layers on the block formats of GGUF files and our own int4 ones, without loss: every stored integer and scale is kept.
//
// A part is 32 weights along k, or 16, with a scale d (and a minimum m): w = d q + m. The sum over a part is a sum
// over q x that is scaled once, in the same order for any number of rows:
//
//     sum_k w_k x_k = (sum_parts m sum_k x_k) + sum_parts d (sum_k q_k x_k)
//
// The product multiplies the integers q exactly. In the K formats d is a float16 of 256 weights by an integer,
// which float32 holds exactly. In the fma kinds the activations x are float32. In the dot kinds they are rounded
// to 16-bit integers with a power of two for every 32: 15 bits of the largest of them, where bfloat16 keeps 8
// bits of each. bfloat16 would be finer only for parts where one activation is hundreds of times the others and
// has a weight near zero. The sums over a part are then exact, whatever instructions compute them.
//
// A panel is 32 output features in two groups of 16. First come the scales and minima of all blocks
// (block_scales.h), then, block by block, the integers of the first and of the second group (block_formats.h).
// Bytes moved per weight, which are those of the file but for the six-bit scales, that take whole bytes:
//
//     Q4_0, IQ4_NL  0.5625      Q2_K    0.328
//     Q4_1          0.625       Q3_K    0.445 (0.430)
//     Q5_0          0.6875      Q4_K    0.578 (0.5625)
//     Q5_1          0.75        Q5_K    0.703 (0.6875)
//     Q8_0          1.0625      Q6_K    0.820
//     MXFP4         0.531       IQ4_XS  0.539 (0.531)
//     INT4_32       0.656       INT4_64 0.578      INT4_128  0.539
//
// The scales of a panel are unpacked to float32 before it is multiplied, so that formats with one kind of integers
// share the code of products.
#pragma once

#include "linear_tile.h"

namespace logitkernels {

std::unique_ptr<PartProduct> quantized_product(const PartTask& task);

// The fma kinds alone, which are compiled beside the others.
std::unique_ptr<PartProduct> quantized_fma_product(const PartTask& task);

}  // namespace logitkernels
