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
    kBf16Tiles = 4,  // as kBf16Dot in AMX's tile registers, which sum in another order
    // Blocks of a type: kFirstBlocks + 2 type for rounded activations (dot), one more for float32
    // ones (fma); see quantized.h.
    kFirstBlocks = 16,
};

// Types of blocks: those of GGUF files by their numbers there, and our own (see ../int4.py). And types of numbers.
enum BlockType : int64_t {
    kF32 = 0,
    kF16 = 1,
    kBF16 = 30,
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

// Rows of a linear layer's weight that are stored in one way. The weights lie in panels of 32 output features, and
// one tile of the product reads a panel from end to end. A float32 or float16 panel is [k][32]. A bf16 panel is
// [k / 2][32][2], so that one 32-bit lane holds two neighbours along k. Features past n and the odd half pair past
// k are zero. Mirrored by library.py.
struct LinearPart {
    int64_t kind;
    int64_t n;
    const void* weights;
};

// A packed linear layer: parts over the same input, whose outputs lie side by side. n counts the features of all of
// them. bias is float32 [n] or null. A part of kind kBf16Dot or kBf16Tiles, for which the rows themselves are rounded,
// stands only beside parts of its own kind, which linear.py asserts.
struct Linear {
    int64_t n;
    int64_t k;
    const float* bias;
    int64_t num_parts;
    const LinearPart* parts;
};

constexpr int64_t kPanelColumns = 32;
// AVX-512: 12 rows by 32 columns keep 24 sums, 4 weights and a broadcast in 32 registers.
// AVX2: 6 rows by 16 columns keep 12 sums, 2 weights and a broadcast in 16.
constexpr int64_t kMaxTileRows = kRegisterSums == 24 ? 12 : 6;

constexpr int64_t kSumBlock = 32;
constexpr int64_t kColumnsPerItem = 8 * kSumBlock;  // columns of one work item, where threads share a row

// Forms of activations that products read, as bits of a set. Without any of them, rows are float32.
enum ActivationForm : int64_t {
    kRoundedRows = 1,  // the rows themselves are Rounded
    kIntegers = 2,     // blocks rounded to integers, in the order o: kIntegers << o
    kSums = 16,        // sums of the h parts of a block: kSums << (h - 1)
};

// Orders of the integers of a block: int16 one after the other, or for products of quads their bytes in the order in
// which weights are unpacked (AVX-512 alone; see activations.cpp).
enum IntegerOrder : int { kWords, kNibbleQuads, kByteQuads, kIntegerOrders };

// Properties of blocks of 32 activations that products with weights in blocks read. A part of a block is what one
// scale of the weights covers: a block or half of one. What no product reads is null.
struct ActivationBlocks {
    int16_t* integers[kIntegerOrders];  // [rows, k]
    float* scales;                      // [rows, k / 32], of the integers
    float* sums[2];                     // [rows, k / 32] and [rows, k / 16], of the activations
    int32_t* integer_sums[2];
};

// Activations in the forms that a linear layer reads: Rounded or float32 rows, `stride` elements apart, and the
// properties of their blocks. A rounded row is padded with a zero to an even length. Code that writes columns of a
// row calls `finish_columns` for them.
struct Activations {
    void* data;
    int64_t stride;
    int64_t forms = 0;
    ActivationBlocks blocks{};

    bool rounded() const { return forms & kRoundedRows; }
    bool has_integers() const { return forms & (((kIntegers << kIntegerOrders) - 1) & ~(kIntegers - 1)); }
    bool has_blocks() const { return forms & ~kRoundedRows; }
};

// The forms of activations that the layer reads.
int64_t forms_of(const Linear& linear);

// Whether the result replaces the values in `out` or is added to them (the residual stream).
enum class Epilogue { kStore, kAdd };

// Elements of a row of activations with `k` features: a whole number of cache lines in either type.
inline int64_t activation_stride(int64_t k) { return round_up(k, 32); }

// Memory for the blocks of rows of activations in some forms.
class BlockBuffers {
  public:
    BlockBuffers(int64_t rows, int64_t k, int64_t forms) {
        const int64_t blocks = rows * ceil_div(k, kSumBlock);
        for (int order = 0; order < kIntegerOrders; ++order)
            if (forms & (kIntegers << order)) {
                integers_[order] = allocate<int16_t>(blocks * kSumBlock);
                scales_ = allocate<float>(blocks);
            }
        for (int h = 0; h < 2; ++h)
            if (forms & (kSums << h)) {
                sums_[h] = allocate<float>(blocks * (h + 1));
                integer_sums_[h] = allocate<int32_t>(blocks * (h + 1));
            }
    }
    ActivationBlocks blocks() const {
        return {{integers_[kWords].get(), integers_[kNibbleQuads].get(), integers_[kByteQuads].get()},
                scales_.get(),
                {sums_[0].get(), sums_[1].get()},
                {integer_sums_[0].get(), integer_sums_[1].get()}};
    }

  private:
    Buffer<int16_t> integers_[kIntegerOrders];
    Buffer<float> scales_, sums_[2];
    Buffer<int32_t> integer_sums_[2];
};

// Computes the block properties of the columns from `first` to before `last` of a row, once they are written.
// Both bounds are multiples of 32 or the row's end. Called by one thread.
void finish_columns(const Activations& x, int64_t row, int64_t first, int64_t last);

// The functions below share their work among the threads of the enclosing parallel region and end in a barrier.

// Converts float32 rows to the forms of `target`.
void convert_activations(const float* x, int64_t ldx, int64_t rows, int64_t k, const Activations& target);

// Calls `finish_columns` for whole rows of k columns, if products read their blocks.
void finish_rows(const Activations& x, int64_t rows, int64_t k);

void multiply(const Linear& linear, const Activations& x, int64_t rows, float* out, int64_t ldo, Epilogue epilogue);

}  // namespace logitkernels
