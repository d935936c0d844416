// Causal attention over the paged cache.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "pointwise.h"
#include "vector.h"

namespace logitkernels {

// Positions of a batch's queries in their sequences and in the cache; see AttentionMetadata in attention.py.
struct Batch {
    int64_t sequences;
    const int32_t* query_start;   // [sequences + 1]
    const int32_t* seq_lens;      // [sequences]
    const int32_t* block_tables;  // [sequences, ...], rows `table_stride` apart
    int64_t table_stride;
    const int64_t* slot_mapping;  // [tokens]
    const int32_t* key_ends;      // [tokens] or null
};

struct Attention {
    int64_t heads;
    int64_t kv_heads;
    int64_t key_size;
    int64_t value_size;
    float scale;
    float softcap;           // 0: none
    int64_t sliding_window;  // 0: none
    const float* sinks;      // [heads] or null
    Cache keys;
    Cache values;
};

// A tile of neighbouring queries of one sequence under one key-value head, and the key blocks that it reads.
struct AttentionItem {
    int64_t sequence;
    int64_t first_query;  // within the sequence's queries
    int64_t queries;
    int64_t kv_head;
    int64_t first_block;
    int64_t last_block;  // exclusive
    int64_t partial;     // offset of its results in AttentionPlan::partials; -1 when it finishes its rows itself
};

// The work of one call, divided in advance. One thread makes the plan and all threads read it.
struct AttentionPlan {
    AttentionPlan(const Attention& attention, const Batch& batch, int threads);

    std::vector<AttentionItem> items;
    std::vector<AttentionItem> merges;  // tiles whose key blocks are divided among several items
    Buffer<float> partials;
    int64_t tile_queries;
    std::unique_ptr<std::atomic<size_t>> taken = std::make_unique<std::atomic<size_t>>(0);  // items taken in the current call
};

// query [tokens, heads, key_size] has rows `query_stride` apart; `out` has rows of heads * value_size. The
// threads of the enclosing parallel region share the work, which ends in a barrier. Between two calls with
// one plan the caller needs another barrier.
void attend(const Attention& attention, const Batch& batch, const AttentionPlan& plan, const float* query,
            int64_t query_stride, const Activations& out);

}  // namespace logitkernels
