// Rows of an embedding in the form in which GGUF files store it, without loss.
#include <bit>
#include <cstring>

#include "block_sources.h"

namespace logitkernels {
namespace {

// Rows of a weight [rows, k] that are found by ids.
struct Rows {
    const uint8_t* raw;
    int64_t rows;
    int64_t k;
    const int64_t* ids;
    int64_t count;
    float* out;
    int threads;

    // Calls decode(source, out) for each row.
    template <class Decode>
    void for_each(int64_t row_bytes, const Decode& decode) const {
#pragma omp parallel for num_threads(threads)
        for (int64_t i = 0; i < count; ++i) decode(raw + ids[i] * row_bytes, out + i * k);
    }
};

// A weight is d q + m, with both operations rounded to float32.
template <class Format>
void decode_blocks(const uint8_t* source, int64_t k, float* out) {
    using Scales = typename Format::Scales;
    constexpr int64_t size = kBlock / Scales::parts;
    Unit unit;
    for (; k > 0; k -= Source<Format>::blocks * kBlock, source += Source<Format>::bytes) {
        Source<Format>::read(source, unit);
        for (int64_t s = 0; s < Source<Format>::blocks * Scales::parts; ++s, out += size) {
            const float d = Scales::scale_of(unit, s);
            for (int64_t i = 0; i < size; ++i) out[i] = d * float(Format::integers.value_of(unit.integers[s * size + i]));
            if constexpr (Scales::has_minimum) {
                const float m = Scales::minimum_of(unit, s);
                for (int64_t i = 0; i < size; ++i) out[i] += m;
            }
        }
    }
}

void decode_float16(const uint8_t* source, int64_t k, float* out) {
    for (int64_t i = 0; i < k; i += kLanes) {
        alignas(32) char values[kFloat16Bytes] = {};
        std::memcpy(values, source + 2 * i, size_t(2 * std::min<int64_t>(k - i, kLanes)));
        store(out + i, lane_mask(k - i), load_float16(values));
    }
}

void decode_bfloat16(const uint8_t* source, int64_t k, float* out) {
    for (int64_t i = 0; i < k; ++i) out[i] = std::bit_cast<float>(uint32_t(load16(source + 2 * i)) << 16);
}

}  // namespace
}  // namespace logitkernels

using namespace logitkernels;

// Writes rows `ids` of a weight [rows, k] to out [count, k]. Returns the place of the first id that is no row, in
// which case nothing is written, else -1.
extern "C" int64_t logitkernels_embed(const uint8_t* raw, int64_t type, int64_t rows, int64_t k, const int64_t* ids,
                                      int64_t count, float* out, int threads) {
    for (int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= rows) return i;
    const Rows found{raw, rows, k, ids, count, out, threads};
    switch (type) {
        case kF32:
            found.for_each(4 * k, [&](const uint8_t* source, float* row) { std::memcpy(row, source, size_t(4 * k)); });
            break;
        case kF16: found.for_each(2 * k, [&](const uint8_t* source, float* row) { decode_float16(source, k, row); }); break;
        case kBF16: found.for_each(2 * k, [&](const uint8_t* source, float* row) { decode_bfloat16(source, k, row); }); break;
        default:
            with_format(type, [&]<class Format>() {
                const int64_t row_bytes = k / kBlock / Source<Format>::blocks * Source<Format>::bytes;
                found.for_each(row_bytes, [&](const uint8_t* source, float* row) { decode_blocks<Format>(source, k, row); });
            });
    }
    return -1;
}
