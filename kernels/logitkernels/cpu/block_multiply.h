// Multiplication of activations by panels of blocks: tiles of rows, and the fetching of the next panel.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>

#include "block_panel.h"
#include "team.h"

namespace logitkernels {

// Adds part H of block b of G groups, from the group `first` on.
template <class Product, int kParts, int H, class Integers, int G, int R>
LOGITKERNELS_INLINE void add_part(const Integers& q, const char* integers, const PanelScales& scales, int first,
                                  const Inputs<typename Product::Element>& in, int64_t b, __m512 (&totals)[G][R]) {
    typename Product::Sum part[G][R];
    Product::template sum_part<kParts, H>(q, vector_at(integers, b, first, Integers::integer_bytes), in, b, part);
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g)
        add_scaled<Product, R>(part[g], scales.scale(first + g, b * kParts + H), in, b, totals[g]);
}

// Computes a tile and meanwhile fetches the lines of the next panel that belong to every `turns`th block, from
// block `turn` on.
template <class Product, int kParts, int R, class Integers>
void fused_tile(const Integers& q, const char* panel, const PanelLayout& layout, const PanelScales& scales,
                const Inputs<typename Product::Element>& in, int64_t turn, int64_t turns, const Target& target) {
    constexpr int G = Product::template groups_together<R>;
    const char *ahead = panel + layout.bytes, *ahead_end = ahead + layout.bytes;
    const int64_t share = round_up(ceil_div(layout.bytes, in.blocks), 64);
    const bool once = turns == 1 && fits_first_level(layout.bytes);  // for the only tile that will read it
    __m512 sums[R][kVectors];
#pragma GCC unroll 2
    for (int first = 0; first < kVectors; first += G) {
        __m512 totals[G][R];
        begin_totals(scales, first, in, totals);
        for (int64_t b = 0, fetched = turn; b < in.blocks; ++b) {
            if (b == fetched && first == 0) {
                fetched += turns;
                const char *line = ahead + b * share, *end = std::min(line + share, ahead_end);
                for (; line < end; line += 64) once ? prefetch_once(line) : prefetch(line);
            }
            add_part<Product, kParts, 0>(q, panel + layout.integers_begin, scales, first, in, b, totals);
            if constexpr (kParts == 2)
                add_part<Product, kParts, 1>(q, panel + layout.integers_begin, scales, first, in, b, totals);
        }
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sums[r][first + g] = totals[g][r];
    }
    finish(sums, target);
}

// Calls tile<R>() for R = rows, at most Most.
template <int Most, class Tile>
LOGITKERNELS_INLINE void tile_of(int64_t rows, const Tile& tile) {
    if constexpr (Most > 1)
        if (rows < Most) return tile_of<Most - 1>(rows, tile);
    tile.template operator()<Most>();
}

// Calls tile(turn, turns, row, size) for each tile of the rows from `first` on, in sizes as equal as possible.
template <class Tile>
LOGITKERNELS_INLINE void for_tiles(int64_t first, int64_t count, int64_t most, const Tile& tile) {
    const int64_t tiles = ceil_div(count, most), small = count / tiles, larger = count % tiles;
    for (int64_t t = 0, row = first; t < tiles; ++t) {
        const int64_t size = small + (t < larger);
        tile(t, tiles, row, size);
        row += size;
    }
}

template <class Product, int kParts, class Integers>
class BlockProduct : public PartProduct {
  public:
    BlockProduct(const Integers& q, const PanelLayout& layout, const PartTask& task)
        : PartProduct(task, Product::row_bytes(task.x, task.k)),
          q_(q),
          layout_(layout),
          all_(Product::template inputs<Integers>(task.x, task.k, kParts)),
          scales_(layout, all_.parts) {
        if constexpr (Product::has_scratch)
            if (task.rows > Product::fused_rows) scratch_.emplace(scales_, layout.blocks);
    }

  private:
    void multiply(int64_t panel, int64_t first, int64_t count) override {
        const char* weights = static_cast<const char*>(task_.part.weights) + panel * layout_.bytes;
        layout_.unpack_scales(weights, layout_.blocks, scales_.scales.get(), scales_.minima.get());
        if constexpr (Product::has_scratch)
            if (count > Product::fused_rows) {
                scratch_->unpack(q_, weights, layout_, ceil_div(count, kScratchRows));
                for_tiles(first, count, kScratchRows, [&](int64_t, int64_t, int64_t row, int64_t size) {
                    tile_of<kScratchRows>(size, [&]<int R>() {
                        scratch_->template tile<R>(from_row(all_, row), task_.target(row, panel));
                    });
                });
                return;
            }
        for_tiles(first, count, Product::fused_rows, [&](int64_t turn, int64_t turns, int64_t row, int64_t size) {
            tile_of<Product::fused_rows>(size, [&]<int R>() {
                fused_tile<Product, kParts, R>(q_, weights, layout_, scales_, from_row(all_, row), turn, turns,
                                               task_.target(row, panel));
            });
        });
    }

    struct NoScratch {};
    using Scratch = std::conditional_t<Product::has_scratch, std::optional<ScratchPanel<Product, kParts>>, NoScratch>;

    const Integers q_;
    const PanelLayout layout_;
    const Inputs<typename Product::Element> all_;
    const PanelScales scales_;
    Scratch scratch_;
};

template <class Product, class Format>
std::unique_ptr<PartProduct> block_product(const PartTask& task) {
    using Integers = typename Format::Integers;
    return std::make_unique<BlockProduct<Product, Format::Scales::parts, Integers>>(
        Format::integers, layout_of<Format>(task.k / kBlock), task);
}

}  // namespace logitkernels
