"""The config of DeepSeek's second and third generation. Free of torch."""

from __future__ import annotations

from logitengine.model.gguf.config_parts import SIGMOID, SOFTMAX, Config, rms, used_experts
from logitengine.model.gguf.keys import Keys

GROUPS = {160: (8, 3), 256: (8, 4)}
"""Groups of experts, and those that a token may take from, by the number of experts: DeepSeek V2's and V3's.

Files of old converters do not say.
"""


def deepseek2(keys: Keys, config: Config) -> Config:
    """Return the members beyond the common ones and those of `latent_heads`."""
    layers, experts = config["num_hidden_layers"], keys.integer("expert_count", 0)
    first = keys.integer("leading_dense_block_count", 0)
    has_bias = keys.has_tensor(f"blk.{first}.exp_probs_b.bias")
    gating = keys.integer("expert_gating_func", SIGMOID if has_bias else SOFTMAX)
    keys.must_be("expert_gating_func", SOFTMAX, SIGMOID)
    keys.must_be("nextn_predict_layers", 0)
    generation = 3 if gating == SIGMOID else 2
    found = rms(keys) | {
        "model_type": f"deepseek_v{generation}",
        "architectures": [f"DeepseekV{generation}ForCausalLM"],
        "rope_parameters": _rope(keys, config),
        "attention_bias": False,
        "first_k_dense_replace": first,
        "moe_intermediate_size": keys.size("expert_feed_forward_length", 1),
    }
    if first >= layers:
        keys.must_be("expert_shared_count", 0)
        return found
    used = used_experts(keys)
    num_groups, groups_used = GROUPS.get(experts, (1, 1))
    num_groups = keys.size("expert_group_count", num_groups)
    groups_used = keys.size("expert_group_used_count", groups_used)
    if experts % num_groups or groups_used > num_groups or used > experts // num_groups * groups_used:
        raise keys.damaged(
            f"a token takes {used} of {experts} experts, from {groups_used} of {num_groups} groups"
        )
    found |= {
        "n_routed_experts": experts,
        "n_shared_experts": keys.size("expert_shared_count"),
        "num_experts_per_tok": used,
        "n_group": num_groups,
        "topk_group": groups_used,
        "routed_scaling_factor": keys.number("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": keys.flag("expert_weights_norm", default=False),
    }
    if generation == 2:
        keys.must_be("expert_weights_norm", False)  # which transformers' model does not know
        found["topk_method"] = "greedy" if num_groups == 1 else "group_limited_greedy"
    return found


def _rope(keys: Keys, config: Config) -> Config:
    """Return the rotary parameters; under YaRN the attention's scores are scaled too."""
    rope: Config = config["rope_parameters"]
    multiplier = keys.number("rope.scaling.yarn_log_multiplier", 0.0)
    if rope["rope_type"] != "yarn" or not multiplier:
        return rope
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        keys.must_be(key, 1.0)
    # The file has a tenth of it. The models have one number for both, so that rotations are not scaled.
    mscale = 10 * multiplier
    return rope | {"mscale": mscale, "mscale_all_dim": mscale}


def latent_heads(keys: Keys, config: Config) -> Config:
    """Return the shape of DeepSeek's attention, whose keys and values are projected from a shared latent.

    Files with ``key_length_mla`` call the latent a single head, and give the size of the projected heads apart.
    """
    heads, rank = config["num_attention_heads"], keys.size("attention.kv_lora_rank")
    rotary = keys.size("rope.dimension_count")
    if keys.has("attention.key_length_mla"):
        key_dim, value_dim = keys.size("attention.key_length_mla"), keys.size("attention.value_length_mla")
        keys.must_be("attention.key_length", rank + rotary)
        keys.must_be("attention.value_length", rank)
        keys.must_be("attention.head_count_kv", 1, heads)
    else:
        key_dim, value_dim = keys.size("attention.key_length"), keys.size("attention.value_length")
        keys.must_be("attention.head_count_kv", heads)
    if key_dim <= rotary or rotary % 2:
        raise keys.damaged(f"its keys have {key_dim} dimensions, of which {rotary} rotate")
    query_rank = keys.integer("attention.q_lora_rank", 0)
    return {
        "num_key_value_heads": heads,
        "kv_lora_rank": rank,
        "q_lora_rank": query_rank if keys.has_tensor("blk.0.attn_q_a.weight") else None,
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": key_dim - rotary,
        "v_head_dim": value_dim,
    }
