// Rows of an embedding in the form in which GGUF files store it or in which a linear layer packs it, without loss.
#include <bit>
#include <cstring>

#include "block_products.h"
#include "block_sources.h"

namespace logitkernels {
namespace {

// Rows of a weight [rows, k] that are found by ids.
struct Rows {
    const void* weight;
    int64_t rows;
    int64_t k;
    const int64_t* ids;
    int64_t count;
    float* out;
    int threads;

    // Returns the place of the first id that is no row, else -1.
    int64_t first_bad() const {
        for (int64_t i = 0; i < count; ++i)
            if (ids[i] < 0 || ids[i] >= rows) return i;
        return -1;
    }

    // Calls decode(id, out) for each row.
    template <class Decode>
    void for_each_id(const Decode& decode) const {
#pragma omp parallel for num_threads(threads)
        for (int64_t i = 0; i < count; ++i) decode(ids[i], out + i * k);
    }

    // Calls decode(source, out) for each row of a weight whose rows lie one after the other.
    template <class Decode>
    void for_each(int64_t row_bytes, const Decode& decode) const {
        const uint8_t* raw = static_cast<const uint8_t*>(weight);
        for_each_id([&](int64_t id, float* row) { decode(raw + id * row_bytes, row); });
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

inline float lane_of(const __m512& vector, int64_t lane) {
    alignas(64) float lanes[kLanes];
    _mm512_store_ps(lanes, vector);
    return lanes[lane];
}

// The same weights, read from a panel of 32 rows. All 16 rows of a group are unpacked and one of them is kept: the panel's
// bytes, which are fetched for it, take longer.
template <class Format>
void decode_panel(const char* panel, int64_t row, int64_t k, float* out) {
    using Scales = typename Format::Scales;
    using Integers = typename Format::Integers;
    constexpr int pairs = kPairs / Scales::parts;
    const int64_t blocks = k / kBlock, g = row / kLanes, lane = row % kLanes;
    const char* integers = panel + Format::integers_begin(blocks);
    const auto part = [&]<int H>(int64_t b) {
        const __m512 d = Scales::template scale<H>(panel, blocks, b, int(g));
        __m512 m = _mm512_setzero_ps();
        if constexpr (Scales::has_minimum) m = Scales::template minimum<H>(panel, blocks, b, int(g));
        const auto weight = [&](const __m512& q) {
            const __m512 scaled = _mm512_mul_ps(d, q);
            return lane_of(Scales::has_minimum ? _mm512_add_ps(scaled, m) : scaled, lane);
        };
        const char* block = vector_at(integers, b, g, Integers::integer_bytes);
        for_each_pair<H * pairs, pairs>([&]<int P>() {
            *out++ = weight(Format::integers.template even<P>(block));
            *out++ = weight(Format::integers.template odd<P>(block));
        });
    };
    for (int64_t b = 0; b < blocks; ++b) {
        part.template operator()<0>(b);
        if constexpr (Scales::parts == 2) part.template operator()<1>(b);
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

extern "C" {

// Writes rows `ids` of a weight [rows, k] to out [count, k]. Returns the place of the first id that is no row, in
// which case nothing is written, else -1.
int64_t logitkernels_embed(const uint8_t* raw, int64_t type, int64_t rows, int64_t k, const int64_t* ids, int64_t count,
                           float* out, int threads) {
    const Rows found{raw, rows, k, ids, count, out, threads};
    if (const int64_t bad = found.first_bad(); bad >= 0) return bad;
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

// The same of a packed weight in blocks.
int64_t logitkernels_embed_packed(const LinearPart* part, int64_t k, const int64_t* ids, int64_t count, float* out,
                                  int threads) {
    const Rows found{part->weights, part->n, k, ids, count, out, threads};
    if (const int64_t bad = found.first_bad(); bad >= 0) return bad;
    with_format(block_type(part->kind), [&]<class Format>() {
        const int64_t panel_bytes = Format::panel_bytes(k / kBlock);
        found.for_each_id([&](int64_t id, float* row) {
            const char* panels = static_cast<const char*>(part->weights);
            decode_panel<Format>(panels + id / kPanelColumns * panel_bytes, id % kPanelColumns, k, row);
        });
    });
    return -1;
}

}  // extern "C"
