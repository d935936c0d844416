// Packing of blocks into panels.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "block_sources.h"

namespace logitkernels {
namespace {

// Stores block i of 16 units.
template <class Integers>
void put_integers(const Unit (&units)[kLanes], int64_t i, char* integers) {
    uint32_t quads[kBlock / 4][kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
        for (int j = 0; j < kBlock / 4; ++j) std::memcpy(&quads[j][lane], units[lane].integers + i * kBlock + 4 * j, 4);
    Integers::put(quads, integers);
}

// Panels are written in order, and the 32 rows of a panel are neighbours in the file unless an order parts them.
template <class Format>
void pack_format(const uint8_t* raw, const int64_t* order, int64_t n, int64_t blocks, char* target, int threads) {
    using Integers = typename Format::Integers;
    using Blocks = Source<Format>;
    const int64_t units = blocks / Blocks::blocks, bytes = Format::panel_bytes(blocks);
#pragma omp parallel for num_threads(threads)
    for (int64_t group = 0; group < ceil_div(n, kPanelColumns) * kVectors; ++group) {
        char *panel = target + group / kVectors * bytes, *integers = panel + Format::integers_begin(blocks);
        const int64_t g = group % kVectors, first = group * kLanes, lanes = std::min<int64_t>(n - first, kLanes);
        Unit features[kLanes] = {};  // zero where there is no feature
        for (int64_t u = 0; u < units; ++u) {
            for (int64_t lane = 0; lane < lanes; ++lane) {
                const int64_t row = order ? order[first + lane] : first + lane;
                Blocks::read(raw + (row * units + u) * Blocks::bytes, features[lane]);
            }
            for (int64_t i = 0; i < Blocks::blocks; ++i) {
                const int64_t b = u * Blocks::blocks + i;
                for (int64_t lane = 0; lane < kLanes; ++lane)
                    Format::Scales::put(panel, blocks, b, g, lane, features[lane], i);
                put_integers<Integers>(features, i, vector_at(integers, b, g, Integers::integer_bytes));
            }
        }
    }
}

}  // namespace
}  // namespace logitkernels

using namespace logitkernels;

extern "C" {

// Asks for huge pages in place of small ones. A system without them ignores it.
void logitkernels_advise_huge_pages(void* memory, int64_t bytes) { madvise(memory, size_t(bytes), MADV_HUGEPAGE); }

// Returns the bytes of a weight [n, k] in panels.
int64_t logitkernels_packed_bytes(int64_t type, int64_t n, int64_t k) {
    int64_t bytes = 0;
    with_format(type, [&]<class Format>() { bytes = ceil_div(n, kPanelColumns) * Format::panel_bytes(k / kBlock); });
    return bytes;
}

// Packs the blocks of a weight [n, k] into panels. Row i of the weight is row order[i] of the file's,
// or row i without an order.
void logitkernels_pack_blocks(const uint8_t* raw, const int64_t* order, int64_t type, int64_t n, int64_t k, char* target,
                              int threads) {
    with_format(type, [&]<class Format>() { pack_format<Format>(raw, order, n, k / kBlock, target, threads); });
}

}  // extern "C"
