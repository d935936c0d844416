// Products of bf16 in AMX's tile registers: 16 rows of activations by 16 output features.
//
// The instructions are compiled wherever AVX-512 is, and run where `request_tiles` has said that they may.
#pragma once

#include <algorithm>

#include "linear_tile.h"

#ifdef LOGITKERNELS_AVX512
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace logitkernels {

// Asks the kernel for the tile registers: a process that has not asked may not use them. Threads that begin later may, too.
// Returns whether the processor has them and multiplies bf16 in them, and the kernel agrees.
inline bool request_tiles() {
    constexpr unsigned tiles_and_bf16 = 1u << 24 | 1u << 22;
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & tiles_and_bf16) != tiles_and_bf16) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

constexpr int kTileRows = 16, kTileRowBytes = 64;

// The first numbers of the tile registers that hold sums, activations and weights.
constexpr int kTileSums = 0, kTileX = 4, kTileWeights = 6;

// Instructions on the registers of these numbers. GCC's intrinsics need options of their own, and literal numbers. Rows in
// memory are `stride` bytes apart.
template <int kTile>
LOGITKERNELS_INLINE void load_tile(const void* source, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(source), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
LOGITKERNELS_INLINE void store_tile(void* target, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(target), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
LOGITKERNELS_INLINE void zero_tile() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTarget, int kX, int kY>
LOGITKERNELS_INLINE void add_bf16_products() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kTarget), "i"(kX), "i"(kY));
}

// Shapes of the tile registers, for as long as it lives: two registers of rows, two of weights, and their sums.
class TileShapes {
  public:
    // Takes the number of rows, up to 32.
    explicit TileShapes(int64_t rows) {
        Configuration shapes{};
        shapes.palette = 1;
        for (int half = 0; half < 2; ++half) {
            const auto count = uint8_t(std::clamp<int64_t>(rows - half * kTileRows, 0, kTileRows));
            for (int v = 0; v < kVectors; ++v) shapes.set(kTileSums + kVectors * half + v, count);
            shapes.set(kTileX + half, count);
            shapes.set(kTileWeights + half, kTileRows);
        }
        asm volatile("ldtilecfg %0" : : "m"(shapes));
    }
    ~TileShapes() { asm volatile("tilerelease"); }
    TileShapes(const TileShapes&) = delete;
    TileShapes& operator=(const TileShapes&) = delete;

  private:
    struct alignas(64) Configuration {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];

        void set(int tile, uint8_t count) {
            rows[tile] = count;
            row_bytes[tile] = count > 0 ? kTileRowBytes : 0;
        }
    };
};

// One instruction sums the even and the odd of 32 steps separately, and then adds both to the register. It does so for any
// number of rows, so a lone row takes this way too.
class Bf16TileProduct : public PartProduct {
  public:
    explicit Bf16TileProduct(const PartTask& task)
        : PartProduct(task, task.x.stride * int64_t(sizeof(bf16)), kMostRows), panel_bytes_(ceil_div(task.k, 2) * kPairBytes) {}

  private:
    static constexpr int64_t kDepth = 32;       // steps along k of one instruction
    static constexpr int64_t kPairBytes = 128;  // of a panel's weights for two steps
    static constexpr int64_t kStepBytes = kDepth / 2 * kPairBytes;
    static constexpr int64_t kMostRows = 2 * kTileRows;

    void multiply(int64_t panel, int64_t first, int64_t count) override {
        const int64_t tiles = ceil_div(count, kMostRows);
        const char* weights = static_cast<const char*>(task_.part.weights) + panel * panel_bytes_;
        const int64_t lines = panel + 1 == panels_ ? 0 : ceil_div(kStepBytes / 64, tiles);
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t row = first + t * kMostRows, size = std::min(kMostRows, first + count - row);
            const int64_t fetched = t * lines * 64 * (task_.k / kDepth);
            const char* ahead = weights + panel_bytes_ + fetched;
            const int64_t own_lines = fetched < panel_bytes_ ? lines : 0;
            const TileShapes shapes(size);
            if (size > kTileRows)
                sum<true>(row, size, weights, ahead, own_lines);
            else
                sum<false>(row, size, weights, ahead, own_lines);
            Target target = task_.target(row, panel);
            for (int64_t r = 0; r < size; ++r, target.out += target.stride) {
                __m512 sums[1][kVectors];
                for (int v = 0; v < kVectors; ++v) sums[0][v] = _mm512_load_ps(sums_[v][r]);
                finish(sums, target);
            }
        }
    }

    // Sums the products of up to 32 rows with a panel, of which `lines` lines of the next one are fetched every step. Steps past
    // k are zeros in copies of the last activations and weights.
    template <bool kTwoHalves>
    void sum(int64_t row, int64_t size, const char* weights, const char* ahead, int64_t lines) {
        const bf16* x = static_cast<const bf16*>(task_.x.data) + row * task_.x.stride;
        zero_tile<kTileSums>();
        zero_tile<kTileSums + 1>();
        if constexpr (kTwoHalves) {
            zero_tile<kTileSums + 2>();
            zero_tile<kTileSums + 3>();
        }
        const int64_t whole = task_.k / kDepth * kDepth, rest = task_.k - whole;
        for (int64_t i = 0; i < whole; i += kDepth, weights += kStepBytes) {
            for (int64_t line = 0; line < lines; ++line, ahead += 64) prefetch(ahead);
            add<kTwoHalves>(x + i, task_.x.stride, weights);
        }
        if (rest > 0) {
            alignas(64) bf16 last_x[kMostRows][kDepth] = {};
            alignas(64) char last_weights[kStepBytes] = {};
            for (int64_t r = 0; r < size; ++r) std::copy_n(x + r * task_.x.stride + whole, rest, last_x[r]);
            std::copy_n(weights, ceil_div(rest, 2) * kPairBytes, last_weights);
            add<kTwoHalves>(last_x[0], kDepth, last_weights);
        }
        store_tile<kTileSums>(sums_[0], kTileRowBytes);
        store_tile<kTileSums + 1>(sums_[1], kTileRowBytes);
        if constexpr (kTwoHalves) {
            store_tile<kTileSums + 2>(sums_[0][kTileRows], kTileRowBytes);
            store_tile<kTileSums + 3>(sums_[1][kTileRows], kTileRowBytes);
        }
    }

    // Adds the products of kDepth steps.
    template <bool kTwoHalves>
    static LOGITKERNELS_INLINE void add(const bf16* x, int64_t stride, const char* weights) {
        const int64_t row_bytes = stride * int64_t(sizeof(bf16));
        load_tile<kTileWeights>(weights, kPairBytes);
        load_tile<kTileWeights + 1>(weights + kTileRowBytes, kPairBytes);
        load_tile<kTileX>(x, row_bytes);
        add_bf16_products<kTileSums, kTileX, kTileWeights>();
        add_bf16_products<kTileSums + 1, kTileX, kTileWeights + 1>();
        if constexpr (kTwoHalves) {
            load_tile<kTileX + 1>(x + kTileRows * stride, row_bytes);
            add_bf16_products<kTileSums + 2, kTileX + 1, kTileWeights>();
            add_bf16_products<kTileSums + 3, kTileX + 1, kTileWeights + 1>();
        }
    }

    const int64_t panel_bytes_;
    alignas(64) float sums_[kVectors][kMostRows][kLanes];
};

}  // namespace logitkernels
#endif
