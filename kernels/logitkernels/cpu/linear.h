// Linear layers on packed weights: out[rows, n] = x[rows, k] @ weight[n, k].T + bias.
#pragma once

#include "vector.h"

namespace logitkernels {

// Storage and multiplication of a linear layer's weights. Mirrored by linear.py.
enum LinearKind : int64_t {
    kBf16Dot = 0,  // bf16 weights, activations rounded to bf16, products summed in float32
    kBf16Fma = 1,  // bf16 weights widened in registers, float32 activations
    kF32Fma = 2,   // float32 weights and activations
    kF16Fma = 3,   // float16 weights widened in registers, float32 activations
    // Blocks of a type: kFirstBlocks + 2 type for rounded activations (dot), one more for float32
    // ones (fma); see quantized.h.
    kFirstBlocks = 16,
};

// Types of blocks: those of GGUF files by their numbers there, and our own (see ../int4.py).
enum BlockType : int64_t {
    kQ40 = 2,
    kQ41 = 3,
    kQ50 = 6,
    kQ51 = 7,
    kQ80 = 8,
    kQ2K = 10,
    kQ3K = 11,
    kQ4K = 12,
    kQ5K = 13,
    kQ6K = 14,
    kIQ4NL = 20,
    kIQ4XS = 23,
    kMXFP4 = 39,
    kInt4By32 = 64,
    kInt4By64 = 65,
    kInt4By128 = 66,
};

inline bool has_blocks(int64_t kind) { return kind >= kFirstBlocks; }
inline int64_t block_type(int64_t kind) { return (kind - kFirstBlocks) / 2; }
inline bool is_fma_of_blocks(int64_t kind) { return has_blocks(kind) && kind % 2 == 1; }

// A packed linear layer. The weights lie in panels of 32 output features, and one tile of the product reads a
// panel from end to end. A float32 or float16 panel is [k][32]. A bf16 panel is [k / 2][32][2], so that one 32-bit lane
// holds two neighbours along k. Features past n and the odd half pair past k are zero. bias is float32 [n] or
// null.
struct Linear {
    int64_t kind;
    int64_t n;
    int64_t k;
    const void* weights;
    const float* bias;
};

constexpr int64_t kPanelColumns = 32;
// AVX-512: 12 rows by 32 columns keep 24 sums, 4 weights and a broadcast in 32 registers.
// AVX2: 6 rows by 16 columns keep 12 sums, 2 weights and a broadcast in 16.
constexpr int64_t kMaxTileRows = kRegisterSums == 24 ? 12 : 6;

constexpr int64_t kSumBlock = 32;
constexpr int64_t kColumnsPerItem = 8 * kSumBlock;  // columns of one work item, where threads share a row

// Properties of blocks of 32 activations that products with weights in blocks read. A part is what one scale of
// the weights covers: a block or half of one.
struct ActivationBlocks {
    int16_t* integers;      // [rows, k]; with AVX-512 some as bytes, see activations.cpp
    float* scales;          // [rows, k / 32], of the integers
    float* sums;            // [rows, parts], of the activations
    int32_t* integer_sums;  // [rows, parts]
};

inline bool reads_rounded(int64_t kind) { return kind == kBf16Dot; }

// Activations in the form that a linear layer of some kind reads: Rounded or float32 rows, `stride` elements
// apart, and the properties of their blocks. A rounded row is padded with a zero to an even length. Code that
// writes columns of a row calls `finish_columns` for them.
struct Activations {
    void* data;
    int64_t stride;
    int64_t kind = kF32Fma;
    ActivationBlocks blocks{};  // null where the kind reads none

    bool rounded() const { return reads_rounded(kind); }
};

// Whether the result replaces the values in `out` or is added to them (the residual stream).
enum class Epilogue { kStore, kAdd };

// Elements of a row of activations with `k` features: a whole number of cache lines in either type.
inline int64_t activation_stride(int64_t k) { return round_up(k, 32); }

// Memory for the blocks of rows of activations, in up to two parts each.
struct BlockBuffers {
    BlockBuffers(int64_t rows, int64_t k)
        : integers(allocate<int16_t>(rows * round_up(k, kSumBlock))),
          scales(allocate<float>(rows * ceil_div(k, kSumBlock))),
          sums(allocate<float>(rows * 2 * ceil_div(k, kSumBlock))),
          integer_sums(allocate<int32_t>(rows * 2 * ceil_div(k, kSumBlock))) {}
    ActivationBlocks blocks() const { return {integers.get(), scales.get(), sums.get(), integer_sums.get()}; }

    Buffer<int16_t> integers;
    Buffer<float> scales, sums;
    Buffer<int32_t> integer_sums;
};

// Computes the block properties of the columns from `first` to before `last` of a row, once they are written.
// Both bounds are multiples of 32 or the row's end. Called by one thread.
void finish_columns(const Activations& x, int64_t row, int64_t first, int64_t last);

// The functions below share their work among the threads of the enclosing parallel region and end in a barrier.

// Converts float32 rows to the form of `target`.
void convert_activations(const float* x, int64_t ldx, int64_t rows, int64_t k, const Activations& target);

// Calls `finish_columns` for whole rows of k columns, if the weights are in blocks.
void finish_rows(const Activations& x, int64_t rows, int64_t k);

void multiply(const Linear& linear, const Activations& x, int64_t rows, float* out, int64_t ldo, Epilogue epilogue);

}  // namespace logitkernels
