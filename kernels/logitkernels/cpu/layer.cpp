// Whole decoder layers of the Llama and Gemma families in one call and one parallel region.
//
//     x += output(attention(rope(qkv(norm(x)))))
//     x += down(activation(gate(norm(x))) * up(norm(x)))
//
// Some layers norm what they add to x.
//
// The residual stream x is float32. Each operation writes its output in the type that the next linear layer reads (bf16
// or float32), so no separate pass converts it.
#include <algorithm>
#include <optional>

#include "attention.h"
#include "linear.h"
#include "pointwise.h"
#include "team.h"

namespace logitkernels {

// Mirrored by library.py.
struct DecoderLayer {
    const Linear* qkv;
    const Linear* output;
    const Linear* gate_up;
    const Linear* down;
    const float* input_norm;
    const float* post_attention_norm;
    const float* q_norm;  // [head_size] or null
    const float* k_norm;
    const float* attention_output_norm;  // [hidden] or null: norms what attention adds to the residual stream
    const float* mlp_output_norm;        // the same of the MLP
    const float* sinks;                  // [heads] or null
    int64_t heads;
    int64_t kv_heads;
    int64_t head_size;
    int64_t sliding_window;
    Gate gate;
    float eps;
    float scale;
    float softcap;  // 0: none
};

namespace {

// Memory for the intermediate results of a layer, reused by every layer.
struct Workspace {
    Workspace(const DecoderLayer* layers, int64_t count, int64_t tokens) {
        int64_t widest_input = 0, forms = 0;
        for (int64_t i = 0; i < count; ++i) {
            for (const Linear* linear : {layers[i].qkv, layers[i].output, layers[i].gate_up, layers[i].down}) {
                widest_input = std::max(widest_input, activation_stride(linear->k));
                forms |= forms_of(*linear);
            }
            widest_output = std::max({widest_output, layers[i].qkv->n, layers[i].output->n, layers[i].gate_up->n});
        }
        input = allocate<float>(tokens * widest_input);
        blocks.emplace(tokens, widest_input, forms);
        projected = allocate<float>(tokens * widest_output);
    }

    Activations input_of(const Linear& linear) const {
        return {input.get(), activation_stride(linear.k), forms_of(linear), blocks->blocks()};
    }

    int64_t widest_output = 0;
    Buffer<float> input;      // input of the next linear layer
    std::optional<BlockBuffers> blocks;
    Buffer<float> projected;  // output of a linear layer that does not go to the residual stream
};

// Norms and rotates queries and keys in place, and writes keys and values to the cache.
void rotate_and_store(const DecoderLayer& layer, float* qkv, int64_t tokens, const float* cos, const float* sin,
                      int64_t rotary, const Cache& keys, const Cache& values, const int64_t* slots) {
    const int64_t size = layer.head_size, all_heads = layer.heads + 2 * layer.kv_heads;
    share(tokens * all_heads, [&](int64_t item) {
        const int64_t token = item / all_heads, head = item % all_heads;
        float* x = qkv + item * size;
        const bool is_query = head < layer.heads, is_value = head >= layer.heads + layer.kv_heads;
        if (is_value) {
            store_head(x, size, values, slots[token], head - layer.heads - layer.kv_heads);
            return;
        }
        const float* weight = is_query ? layer.q_norm : layer.k_norm;
        if (weight != nullptr) norm_head(x, weight, layer.eps, size);
        rotate_head(x, cos + token * rotary, sin + token * rotary, rotary, size, x);
        if (!is_query) store_head(x, size, keys, slots[token], head - layer.heads);
    });
}

}  // namespace
}  // namespace logitkernels

using namespace logitkernels;

// Pins thread i of a region to cpus[i], from the next layer, linear layer or attention on.
extern "C" void logitkernels_pin_threads(const int32_t* cpus, int64_t count) { region_cpus.assign(cpus, cpus + count); }

// hidden [tokens, h] float32 is updated in place. keys and values hold one cache per layer.
extern "C" void logitkernels_decoder_layers(const DecoderLayer* layers, int64_t count, float* hidden, int64_t tokens,
                                            const float* cos, const float* sin, int64_t rotary, const Cache* keys,
                                            const Cache* values, const Batch* batch, int threads) {
    const Workspace workspace(layers, count, tokens);
    std::vector<AttentionPlan> plans;
    std::vector<Attention> attentions;
    std::vector<size_t> plan_of;
    for (int64_t i = 0; i < count; ++i) {
        const DecoderLayer& layer = layers[i];
        attentions.push_back({layer.heads, layer.kv_heads, layer.head_size, layer.head_size, layer.scale, layer.softcap,
                              layer.sliding_window, layer.sinks, keys[i], values[i]});
        // Layers of one shape and window divide their work in the same way.
        size_t same = 0;
        for (; same < size_t(i); ++same)
            if (layers[same].heads == layer.heads && layers[same].kv_heads == layer.kv_heads &&
                layers[same].head_size == layer.head_size && layers[same].sliding_window == layer.sliding_window)
                break;
        if (same == size_t(i)) {
            plans.emplace_back(attentions.back(), *batch, threads);
            plan_of.push_back(plans.size() - 1);
        } else {
            plan_of.push_back(plan_of[same]);
        }
    }
    const auto run = [&](int64_t i) {
        const DecoderLayer& layer = layers[i];
        const int64_t h = layer.qkv->k, qkv_width = layer.qkv->n;
        float* projected = workspace.projected.get();
        const auto add_to_residual = [&](const Linear& linear, const float* norm) {
            const Activations input = workspace.input_of(linear);
            if (norm == nullptr) return multiply(linear, input, tokens, hidden, h, Epilogue::kAdd);
            multiply(linear, input, tokens, projected, h, Epilogue::kStore);
            add_rms_norm(projected, h, norm, layer.eps, tokens, h, hidden);
        };

        rms_norm(hidden, h, layer.input_norm, layer.eps, tokens, h, workspace.input_of(*layer.qkv));
        multiply(*layer.qkv, workspace.input_of(*layer.qkv), tokens, projected, qkv_width, Epilogue::kStore);
        rotate_and_store(layer, projected, tokens, cos, sin, rotary, keys[i], values[i], batch->slot_mapping);
        attend(attentions[size_t(i)], *batch, plans[plan_of[size_t(i)]], projected, qkv_width,
               workspace.input_of(*layer.output));
        add_to_residual(*layer.output, layer.attention_output_norm);

        rms_norm(hidden, h, layer.post_attention_norm, layer.eps, tokens, h, workspace.input_of(*layer.gate_up));
        multiply(*layer.gate_up, workspace.input_of(*layer.gate_up), tokens, projected, layer.gate_up->n,
                 Epilogue::kStore);
        gate_and_mul(layer.gate, projected, tokens, layer.down->k, workspace.input_of(*layer.down));
        add_to_residual(*layer.down, layer.mlp_output_norm);
    };
    in_team(threads, [&] {
        for (int64_t i = 0; i < count; ++i) run(i);
    });
}
