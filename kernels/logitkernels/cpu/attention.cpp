// Attention is computed in blocks of 128 keys. The blocks are those of the logical sequence, counted from its
// first token. So they depend neither on the query's chunk nor on where the cache keeps the keys. Within a
// block a row (one query of one head) takes the exact maximum of its scores; block results are merged in
// ascending order:
//
//     m' = max(m, m_b),  l' = l exp(m - m') + l_b exp(m_b - m'),  o' = o exp(m - m') + o_b exp(m_b - m')
//
// as in Dao et al., "FlashAttention" (2022). A block's result does not depend on the thread that computes it.
// So long sequences may be divided among threads at block boundaries and merged afterwards in the same order:
// the bits stay the same.
//
// Keys are read transposed, 16 in a vector. Where the cache is not transposed, or many rows share the keys, a
// block of keys is first copied to float32. Its values are copied too when many rows share them. So a decode
// step moves each cached byte once: 2 (D + Dv) bytes per token, layer and key-value head in bf16.
#include "attention.h"

#include <algorithm>

#include "attention_block.h"
#include "team.h"

namespace logitkernels {
namespace {

constexpr int64_t kTileRows = 96;  // rows that share the transposed keys of a block
constexpr int kChunkRows = 6;

// First position that the query at `position` attends to.
inline int64_t first_visible(const Attention& attention, int64_t position) {
    const int64_t window = attention.sliding_window;
    return window > 0 ? std::max<int64_t>(0, position + 1 - window) : 0;
}

// End of the positions that the batch's query `token`, at `position`, attends to. It never decreases from one query
// of a sequence to the next.
inline int64_t end_visible(const Batch& batch, int64_t token, int64_t position) {
    return batch.key_ends == nullptr ? position + 1 : batch.key_ends[token];
}

inline Range within_block(Range range, int64_t block) {
    const int64_t start = block * kBlockKeys;
    return {std::max<int64_t>(range.from - start, 0), std::min(range.to - start, kBlockKeys)};
}

// Elements of a block's result for one row (output, maximum, sum), in which items of a divided tile leave it
// for the merge. A negative sum means that the row sees nothing of the block.
inline int64_t partial_stride(int64_t padded_value_size) { return padded_value_size + kLanes; }

// A block of keys and values that a tile reads.
struct KeyBlock {
    const AttentionItem* item = nullptr;
    int64_t block = 0;
};

// One thread's working memory and the loops that use it.
template <class Element>
class Worker {
  public:
    Worker(const Attention& attention, const Batch& batch, const AttentionPlan& plan)
        : attention_(attention),
          batch_(batch),
          group_(attention.heads / attention.kv_heads),
          padded_(round_up(attention.value_size, kLanes)),
          keys_(allocate<float>(round_up(attention.key_size, kLanes) * kBlockKeys)),
          values_(allocate<float>(kBlockKeys * padded_)),
          query_(allocate<float>(plan.tile_queries * group_ * attention.key_size)),
          output_(allocate<float>(plan.tile_queries * group_ * padded_)),
          states_(allocate<RowState>(plan.tile_queries * group_)),
          scores_(allocate<float>(kChunkRows * kBlockKeys)),
          block_output_(allocate<float>(kChunkRows * padded_)),
          fetcher_(2 * kBlockKeys) {
        cached_keys_.stride = attention.keys.element_stride;
        widened_keys_.stride = kBlockKeys;
        for (int64_t group = 0; group < kBlockKeys / kLanes; ++group)
            widened_keys_.groups[group] = keys_.get() + group * kLanes;
    }

    // `next` is this thread's next item or null. Its first block is fetched during the last block of `item`.
    void run(const AttentionItem& item, const AttentionItem* next, const float* query, int64_t query_stride,
             const Activations& out, float* partials) {
        begin(item);
        scale_queries(item, query, query_stride);
        for (int64_t block = item.first_block; block < item.last_block; ++block) {
            upcoming_ = block + 1 < item.last_block ? KeyBlock{&item, block + 1}
                        : next != nullptr           ? KeyBlock{next, next->first_block}
                                                    : KeyBlock{};
            fetcher_.begin(fetches_by_halves() && fits_first_level(half_bytes(attention_.value_size)));
            if (fetches_by_halves())
                plan_values({&item, block});
            else
                plan_keys(upcoming_), plan_values(upcoming_);
            fetcher_.spread(keys_seen({&item, block}) * attention_.key_size / (2 * kLanes));
            load_block(item, block);
            float* partial = item.partial < 0 ? nullptr
                                              : partials + (item.partial + (block - item.first_block) * rows_) *
                                                               partial_stride(padded_);
            for (int64_t row = 0; row < rows_;) {
                // Chunks are balanced: 8 rows are 4 and 4.
                const int64_t chunks = ceil_div(rows_ - row, kChunkRows), size = ceil_div(rows_ - row, chunks);
                chunk_of(size, row, block, partial);
                row += size;
            }
        }
        if (item.partial < 0) finish(item, out);
    }

    void merge_partials(const AttentionItem& item, const float* partials, const Activations& out) {
        begin(item);
        const int64_t stride = partial_stride(padded_);
        const float* partial = partials + item.partial * stride;
        for (int64_t block = item.first_block; block < item.last_block; ++block)
            for (int64_t row = 0; row < rows_; ++row, partial += stride) {
                const RowState result{partial[padded_], partial[padded_ + 1]};
                if (result.sum >= 0) merge(states_[row], output_.get() + row * padded_, result, partial, padded_);
            }
        finish(item, out);
    }

  private:
    // The position of the first query of a tile.
    int64_t position_of(const AttentionItem& item) const {
        const int64_t query_len = batch_.query_start[item.sequence + 1] - batch_.query_start[item.sequence];
        return batch_.seq_lens[item.sequence] - query_len + item.first_query;
    }

    void begin(const AttentionItem& item) {
        first_position_ = position_of(item);
        first_token_ = batch_.query_start[item.sequence] + item.first_query;
        rows_ = item.queries * group_;
        std::fill_n(output_.get(), rows_ * padded_, 0.0f);
        std::fill_n(states_.get(), rows_, RowState{kMinusInfinity, 0.0f});
    }

    Range visible_to_row(int64_t row) const {
        const int64_t query = row / group_, position = first_position_ + query;
        return {first_visible(attention_, position), end_visible(batch_, first_token_ + query, position)};
    }

    // Row r is query r / group of the tile and head r % group of the key-value head.
    void scale_queries(const AttentionItem& item, const float* query, int64_t stride) {
        const int64_t size = attention_.key_size;
        const __m512 scale = _mm512_set1_ps(attention_.scale);
        for (int64_t row = 0; row < rows_; ++row) {
            const int64_t token = batch_.query_start[item.sequence] + item.first_query + row / group_;
            const float* source = query + token * stride + (item.kv_head * group_ + row % group_) * size;
            float* target = query_.get() + row * size;
            for (int64_t d = 0; d < size; d += kLanes) {
                const __mmask16 mask = lane_mask(size - d);
                store(target + d, mask, _mm512_mul_ps(load(source + d, mask), scale));
            }
        }
    }

    // A few rows read keys and values in place, if the cache's layout allows it. A copy pays when several
    // chunks of rows read it.
    bool reads_keys_in_place() const { return rows_ <= kChunkRows && attention_.keys.is_transposed(); }
    bool reads_values_in_place() const { return rows_ <= kChunkRows && padded_ == attention_.value_size; }

    // Scoring the keys of a block fetches its values, and weighing the values fetches the next block's keys.
    // Where values are copied first, or chunks of rows alternate between scoring and weighing, the next block
    // is fetched during all of this one.
    bool fetches_by_halves() const { return reads_values_in_place(); }

    // Bytes of the keys, or of the values, of a block.
    static int64_t half_bytes(int64_t size) { return kBlockKeys * size * int64_t(sizeof(Element)); }

    // Finds or copies the keys and values of a block that the tile sees.
    void load_block(const AttentionItem& item, int64_t block) {
        const int64_t start = block * kBlockKeys;
        const Range seen{within_block(visible_to_row(0), block).from / kLanes * kLanes,
                         within_block(visible_to_row(rows_ - 1), block).to};
        // Scores of up to four groups are computed at once. Groups that no row sees are read too, so they
        // need a valid address.
        if (reads_keys_in_place())
            std::fill_n(cached_keys_.groups, kBlockKeys / kLanes, group_of(item, start + seen.from));
        for (int64_t group = seen.from; group < seen.to; group += kLanes) {
            load_keys(item, start + group, start + seen.to - 1, group);
            load_values(item, start + group, start + seen.to - 1, group);
        }
    }

    // Lanes past the last key repeat it or are slots of the same cache block. They are masked later, and no
    // memory beyond the cache is read.
    void load_keys(const AttentionItem& item, int64_t position, int64_t last, int64_t group) {
        if (!attention_.keys.is_transposed()) {
            const Element* rows[kLanes];
            find_rows(attention_.keys, item, position, last, rows);
            return transpose_keys(rows, attention_.key_size, keys_.get() + group);
        }
        const Element* keys = group_of(item, position);
        if (reads_keys_in_place()) {
            cached_keys_.groups[group / kLanes] = keys;
            return;
        }
        for (int64_t d = 0; d < attention_.key_size; ++d)
            _mm512_store_ps(keys_.get() + d * kBlockKeys + group, load(keys + d * attention_.keys.element_stride, 0xffff));
    }

    void load_values(const AttentionItem& item, int64_t position, int64_t last, int64_t group) {
        find_rows(attention_.values, item, position, last, value_rows_ + group);
        if (reads_values_in_place()) return;
        for (int64_t i = 0; i < kLanes; ++i)
            for (int64_t d = 0; d < padded_; d += kLanes)
                _mm512_store_ps(values_.get() + (group + i) * padded_ + d,
                                load(value_rows_[group + i] + d, lane_mask(attention_.value_size - d)));
    }

    // Finds the rows of the 16 positions from `position`. Those past `last` repeat it or are slots of the
    // same cache block.
    void find_rows(const Cache& cache, const AttentionItem& item, int64_t position, int64_t last, const Element** rows) const {
        const int32_t* table = batch_.block_tables + item.sequence * batch_.table_stride + position / cache.block_size;
        int64_t offset = position % cache.block_size;
        if (offset + kLanes <= cache.block_size) {
            const Element* row = row_of(cache, *table, item.kv_head, offset);
            for (int64_t i = 0; i < kLanes; ++i) rows[i] = row + i * cache.token_stride;
            return;
        }
        for (int64_t i = 0; i < kLanes; ++i) {
            rows[i] = row_of(cache, *table, item.kv_head, offset);
            if (position + i >= last) continue;
            if (++offset == cache.block_size) offset = 0, ++table;
        }
    }

    // Finds 16 positions in a transposed cache, where they are neighbours.
    const Element* group_of(const AttentionItem& item, int64_t position) const {
        const Cache& cache = attention_.keys;
        const int32_t* table = batch_.block_tables + item.sequence * batch_.table_stride;
        return row_of(cache, table[position / cache.block_size], item.kv_head, position % cache.block_size);
    }

    // Positions of a block that a tile sees, starting at a whole group.
    Range seen_of(const KeyBlock& block) const {
        const AttentionItem& item = *block.item;
        const int64_t first = position_of(item), start = block.block * kBlockKeys, last = item.queries - 1;
        const int64_t token = batch_.query_start[item.sequence] + item.first_query;
        return {std::max(first_visible(attention_, first), start) / kLanes * kLanes,
                std::min(start + kBlockKeys, end_visible(batch_, token + last, first + last))};
    }

    int64_t keys_seen(const KeyBlock& block) const {
        const Range seen = seen_of(block);
        return seen.to - seen.from;
    }

    // Plan the memory of a block that will be read, in that order. It is scattered over the cache, so the
    // processor does not prefetch it.
    void plan_keys(const KeyBlock& block) {
        if (block.item == nullptr) return;
        const Cache& keys = attention_.keys;
        if (!keys.is_transposed()) return plan_rows(keys, block, attention_.key_size);
        const Range seen = seen_of(block);
        for (int64_t position = seen.from; position < seen.to; position = (position / keys.block_size + 1) * keys.block_size) {
            const Element* group = group_of(*block.item, position / keys.block_size * keys.block_size);
            fetcher_.add(group, attention_.key_size * keys.element_stride * int64_t(sizeof(Element)));
        }
    }
    void plan_values(const KeyBlock& block) {
        if (block.item != nullptr) plan_rows(attention_.values, block, attention_.value_size);
    }
    void plan_rows(const Cache& cache, const KeyBlock& block, int64_t size) {
        const Range seen = seen_of(block);
        const int32_t* table = batch_.block_tables + block.item->sequence * batch_.table_stride;
        for (int64_t position = seen.from; position < seen.to;) {
            const int64_t offset = position % cache.block_size;
            const int64_t rows = std::min(cache.block_size - offset, seen.to - position);
            const Element* row = row_of(cache, table[position / cache.block_size], block.item->kv_head, offset);
            if (cache.token_stride == size)
                fetcher_.add(row, rows * size * int64_t(sizeof(Element)));
            else
                for (int64_t i = 0; i < rows; ++i) fetcher_.add(row + i * cache.token_stride, size * int64_t(sizeof(Element)));
            position += rows;
        }
    }

    static const Element* row_of(const Cache& cache, int64_t block, int64_t head, int64_t offset) {
        return static_cast<const Element*>(cache.data) + block * cache.block_stride + head * cache.head_stride +
               offset * cache.token_stride;
    }

    void chunk_of(int64_t size, int64_t row, int64_t block, float* partial) {
        switch (size) {
            case 1: return chunk<1>(row, block, partial);
            case 2: return chunk<2>(row, block, partial);
            case 3: return chunk<3>(row, block, partial);
            case 4: return chunk<4>(row, block, partial);
            case 5: return chunk<5>(row, block, partial);
            default: return chunk<6>(row, block, partial);
        }
    }

    template <int R>
    void chunk(int64_t first_row, int64_t block, float* partial) {
        Range keys[R], all{kBlockKeys, 0}, shared{0, kBlockKeys};
        for (int r = 0; r < R; ++r) {
            keys[r] = within_block(visible_to_row(first_row + r), block);
            shared = {std::max(shared.from, keys[r].from), std::min(shared.to, keys[r].to)};
            if (!keys[r].empty()) all = {std::min(all.from, keys[r].from), std::max(all.to, keys[r].to)};
        }
        RowState states[R];
        if (!all.empty()) {
            const float* query = query_.get() + first_row * attention_.key_size;
            if (reads_keys_in_place())
                score<R>(query, attention_.key_size, cached_keys_, all, scores_.get(), fetcher_);
            else
                score<R>(query, attention_.key_size, widened_keys_, all, scores_.get(), fetcher_);
            if (fetches_by_halves()) {
                fetcher_.begin(fits_first_level(half_bytes(attention_.key_size)));
                plan_keys(upcoming_);
                fetcher_.spread((all.to - all.from) * padded_ / (2 * kLanes));
            }
            for (int r = 0; r < R; ++r)
                if (!keys[r].empty()) states[r] = soften(scores_.get() + r * kBlockKeys, keys[r], attention_.softcap);
            if (reads_values_in_place())
                weigh_block<R>(keys, shared, CachedValues<Element>{value_rows_});
            else
                weigh_block<R>(keys, shared, WidenedValues{values_.get(), padded_});
        }
        for (int r = 0; r < R; ++r) {
            const float* result = block_output_.get() + r * padded_;
            if (partial != nullptr) {
                float* target = partial + (first_row + r) * partial_stride(padded_);
                std::copy_n(result, keys[r].empty() ? 0 : padded_, target);
                target[padded_] = keys[r].empty() ? kMinusInfinity : states[r].maximum;
                target[padded_ + 1] = keys[r].empty() ? -1.0f : states[r].sum;
            } else if (!keys[r].empty()) {
                merge(states_[first_row + r], output_.get() + (first_row + r) * padded_, states[r], result, padded_);
            }
        }
    }

    // Rows are computed together over the keys that all of them see, and one by one over the rest. A row
    // never touches a key that it does not see, not even with weight zero: zero times another token's
    // infinity would be NaN.
    template <int R, class Values>
    void weigh_block(const Range (&keys)[R], Range shared, const Values& values) {
        std::fill_n(block_output_.get(), R * padded_, 0.0f);
        const float* weights = scores_.get();
        float* output = block_output_.get();
        auto alone = [&](int r, Range range) {
            if (!range.empty()) weigh<1>(weights + r * kBlockKeys, values, range, output + r * padded_, padded_, fetcher_);
        };
        if (shared.empty()) {
            for (int r = 0; r < R; ++r) alone(r, keys[r]);
            return;
        }
        for (int r = 0; r < R; ++r) alone(r, {keys[r].from, shared.from});
        weigh<R>(weights, values, shared, output, padded_, fetcher_);
        for (int r = 0; r < R; ++r) alone(r, {shared.to, keys[r].to});
    }

    void finish(const AttentionItem& item, const Activations& out) {
        const int64_t size = attention_.value_size, width = attention_.heads * size;
        for (int64_t row = 0; row < rows_; ++row) {
            const int64_t token = batch_.query_start[item.sequence] + item.first_query + row / group_;
            const int64_t head = item.kv_head * group_ + row % group_;
            const RowState& state = states_[row];
            __m512 factor = _mm512_set1_ps(1.0f / state.sum);
            if (attention_.sinks != nullptr) {
                // A sink acts as one more key with a value of zero.
                const float sink = attention_.sinks[head], maximum = std::max(state.maximum, sink);
                const __m512 kept = exponential(_mm512_set1_ps(state.maximum - maximum));
                const __m512 sunk = exponential(_mm512_set1_ps(sink - maximum));
                factor = _mm512_div_ps(kept, _mm512_add_ps(_mm512_mul_ps(kept, _mm512_set1_ps(state.sum)), sunk));
            }
            for (int64_t d = 0; d < size; d += kLanes) {
                const __mmask16 mask = lane_mask(size - d);
                const __m512 result = _mm512_mul_ps(_mm512_load_ps(output_.get() + row * padded_ + d), factor);
                const int64_t offset = token * out.stride + head * size + d;
                if (out.rounded())
                    store(static_cast<Rounded*>(out.data) + offset, mask, result);
                else
                    store(static_cast<float*>(out.data) + offset, mask, result);
            }
            if (out.rounded() && head + 1 == attention_.heads && width % 2)
                static_cast<Rounded*>(out.data)[token * out.stride + width] = {};
            if (size % kSumBlock == 0) finish_columns(out, token, head * size, (head + 1) * size);
        }
    }

    const Attention& attention_;
    const Batch& batch_;
    const int64_t group_, padded_;
    Buffer<float> keys_, values_, query_, output_;
    Buffer<RowState> states_;
    Buffer<float> scores_, block_output_;
    Fetcher fetcher_;
    KeyBlock upcoming_;  // block that this thread reads after the current one
    KeyGroups<Element> cached_keys_;
    KeyGroups<float> widened_keys_;
    const Element* value_rows_[kBlockKeys];
    int64_t first_position_ = 0, first_token_ = 0, rows_ = 0;
};

template <class Element>
void attend_typed(const Attention& attention, const Batch& batch, const AttentionPlan& plan, const float* query,
                  int64_t query_stride, const Activations& out) {
    Worker<Element> worker(attention, batch, plan);
    // A thread takes its next item before it runs the current one, to know what to fetch.
    const size_t count = plan.items.size();
    std::atomic<size_t>& taken = *plan.taken;
    for (size_t item = taken++; item < count;) {
        const size_t next = taken++;
        worker.run(plan.items[item], next < count ? &plan.items[next] : nullptr, query, query_stride, out,
                   plan.partials.get());
        item = next;
    }
    place.team->barrier();
    if (place.thread == 0) taken = 0;  // for the next call, which another barrier precedes
    if (!plan.merges.empty())
        share(int64_t(plan.merges.size()), [&](int64_t merge) {
            worker.merge_partials(plan.merges[size_t(merge)], plan.partials.get(), out);
        });
    // Heads that share blocks are finished once all heads are written.
    if (attention.value_size % kSumBlock)
        finish_rows(out, batch.query_start[batch.sequences], attention.heads * attention.value_size);
}

}  // namespace

AttentionPlan::AttentionPlan(const Attention& attention, const Batch& batch, int threads) {
    const int64_t group = attention.heads / attention.kv_heads;
    int64_t longest = 1;
    for (int64_t s = 0; s < batch.sequences; ++s)
        longest = std::max<int64_t>(longest, batch.query_start[s + 1] - batch.query_start[s]);
    tile_queries = std::min(std::max<int64_t>(kTileRows / group, 1), longest);
    for (int64_t s = 0; s < batch.sequences; ++s) {
        const int64_t query_len = batch.query_start[s + 1] - batch.query_start[s];
        for (int64_t first = 0; first < query_len; first += tile_queries) {
            const int64_t queries = std::min(tile_queries, query_len - first);
            const int64_t position = batch.seq_lens[s] - query_len + first;
            const int64_t last = first + queries - 1, last_token = batch.query_start[s] + last;
            const int64_t from = first_visible(attention, position) / kBlockKeys;
            const int64_t to = ceil_div(end_visible(batch, last_token, position + queries - 1), kBlockKeys);
            for (int64_t head = 0; head < attention.kv_heads; ++head)
                items.push_back({s, first, queries, head, from, to, -1});
        }
    }
    // With too few tiles to keep the threads busy, long tiles are divided at block boundaries.
    if (threads > 1 && int64_t(items.size()) < 4 * threads) {
        std::vector<AttentionItem> whole;
        whole.swap(items);
        int64_t partial = 0;
        for (AttentionItem item : whole) {
            const int64_t blocks = item.last_block - item.first_block;
            if (blocks < 2) {
                items.push_back(item);
                continue;
            }
            item.partial = partial;
            merges.push_back(item);
            const int64_t size = ceil_div(blocks, std::min<int64_t>(blocks, 2 * threads));
            for (int64_t block = item.first_block; block < item.last_block; block += size) {
                AttentionItem part = item;
                part.first_block = block;
                part.last_block = std::min(block + size, item.last_block);
                part.partial = partial + (block - item.first_block) * item.queries * group;
                items.push_back(part);
            }
            partial += blocks * item.queries * group;
        }
        partials = allocate<float>(partial * partial_stride(round_up(attention.value_size, kLanes)));
    }
    // Longest first, so that no thread ends alone with a long one.
    std::stable_sort(items.begin(), items.end(), [](const AttentionItem& a, const AttentionItem& b) {
        return a.queries * (a.last_block - a.first_block) > b.queries * (b.last_block - b.first_block);
    });
}

void attend(const Attention& attention, const Batch& batch, const AttentionPlan& plan, const float* query,
            int64_t query_stride, const Activations& out) {
    if (attention.keys.is_bf16)
        attend_typed<bf16>(attention, batch, plan, query, query_stride, out);
    else
        attend_typed<float>(attention, batch, plan, query, query_stride, out);
}

}  // namespace logitkernels

using namespace logitkernels;

extern "C" void logitkernels_attention(const Attention* attention, const Batch* batch, const float* query, float* out,
                                       int threads) {
    AttentionPlan plan(*attention, *batch, threads);
    const Activations target{out, attention->heads * attention->value_size};
    in_team(threads, [&] { attend(*attention, *batch, plan, query, attention->heads * attention->key_size, target); });
}
