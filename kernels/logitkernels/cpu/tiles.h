// AMX's tile registers: sums of 16 rows of activations by 16 output features.
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
constexpr int kSums = 0, kRows = 4, kWeights = 6;

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
            for (int v = 0; v < kVectors; ++v) shapes.set(kSums + kVectors * half + v, count);
            shapes.set(kRows + half, count);
            shapes.set(kWeights + half, kTileRows);
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

}  // namespace logitkernels
#endif
