"""Small models of every architecture that is served from GGUF files, with the keys that llama.cpp's conversion writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCAB = 320
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 8}


@dataclass(frozen=True)
class Case:
    """A config of transformers, and what llama.cpp's conversion writes of it beside the common keys."""

    architecture: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
LINEAR_KEYS = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
GEMMA3_TYPES = ["sliding_attention", "sliding_attention", "full_attention"]

DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "head_dim": None,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
LATENT_KEYS: dict[str, Any] = {
    "attention.kv_lora_rank": 32,
    "attention.key_length": 48,
    "attention.value_length": 32,
    "rope.dimension_count": 16,
    "leading_dense_block_count": 1,
    "expert_shared_count": 2,
}
SPLIT_LATENT_KEYS = LATENT_KEYS | {
    "attention.head_count_kv": 1,
    "attention.key_length": 48,
    "attention.key_length_mla": 48,
    "attention.value_length_mla": 32,
}
GROUPS = {"n_group": 2, "topk_group": 1}
GROUP_KEYS = {"expert_group_count": 2, "expert_group_used_count": 1}

CASES = {
    "llama": Case("llama", "llama", {}, {"vocab_size": VOCAB}),
    "llama-tied": Case("llama", "llama", {"tie_word_embeddings": True}),
    "llama-biases": Case("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": Case("llama", "llama", {"rope_parameters": LINEAR}, LINEAR_KEYS),
    "llama-old-linear": Case("llama", "llama", {"rope_parameters": LINEAR}, {"rope.scale_linear": 4.0}),
    "mixtral": Case(
        "llama",
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mistral": Case("llama", "mistral", {"sliding_window": None}),
    "granite": Case(
        "granite",
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
        },
        {"embedding_scale": 3.0, "residual_scale": 0.5, "attention.scale": 0.1, "logit_scale": 2.0},
    ),
    "smollm3": Case(
        "smollm3", "smollm3", {"num_hidden_layers": 5, "use_sliding_window": False, "layer_types": None}
    ),
    "qwen2": Case("qwen2", "qwen2"),
    "qwen2-yarn": Case("qwen2", "qwen2", {"rope_parameters": YARN}, YARN_KEYS),
    "qwen2-yarn-betas": Case(
        "qwen2",
        "qwen2",
        {"rope_parameters": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}},
        {**YARN_KEYS, "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
    ),
    "qwen3": Case("qwen3", "qwen3"),
    "qwen3moe": Case(
        "qwen3moe",
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "gemma": Case("gemma", "gemma"),
    "gemma2": Case(
        "gemma2",
        "gemma2",
        {
            **SLIDING,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
        {"attention.sliding_window": 8, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    ),
    "gemma2-default-caps": Case(
        "gemma2", "gemma2", {**SLIDING, "query_pre_attn_scalar": 32}, {"attention.sliding_window": 8}
    ),
    "gemma3": Case(
        "gemma3",
        "gemma3_text",
        {
            **SLIDING,
            "query_pre_attn_scalar": 32,
            "layer_types": GEMMA3_TYPES,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [True, True, False],
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "gemma3-six": Case(
        "gemma3",
        "gemma3_text",
        {**SLIDING, "query_pre_attn_scalar": 32, "num_hidden_layers": 7, "layer_types": None},
        {"attention.sliding_window": 8, "mm.tokens_per_image": 256},
    ),
    "phi3": Case("phi3", "phi3", {**SLIDING, "head_dim": 16}, {"attention.sliding_window": 8}),
    "phi3-partial": Case(
        "phi3",
        "phi3",
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
        {"rope.dimension_count": 8},
    ),
    "olmo2": Case("olmo2", "olmo2", {"head_dim": 16}),
    "command-r": Case(
        "command-r",
        "cohere",
        {"head_dim": 16, "logit_scale": 0.5, "layer_norm_eps": 1e-5},
        {"attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.5},
    ),
    "command-r-plus": Case(
        "command-r",
        "cohere",
        {"head_dim": 16, "logit_scale": 0.5, "layer_norm_eps": 1e-5, "use_qk_norm": True},
        {"attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.5},
    ),
    "cohere2": Case(
        "cohere2",
        "cohere2",
        {**SLIDING, "num_hidden_layers": 5, "logit_scale": 0.5, "layer_norm_eps": 1e-5},
        {"attention.sliding_window": 8, "attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.5},
    ),
    "glm4": Case(
        "glm4",
        "glm4",
        {
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
        {"rope.dimension_count": 16},
    ),
    "ernie4_5": Case("ernie4_5", "ernie4_5"),
    "gpt-oss": Case(
        "gpt-oss",
        "gpt_oss",
        {
            **SLIDING,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {**YARN, "truncate": False},
        },
        {**YARN_KEYS, "attention.sliding_window": 8},
    ),
    "deepseek2-lite": Case("deepseek2", "deepseek_v2", {**DEEPSEEK, "q_lora_rank": None}, LATENT_KEYS),
    "deepseek2-v2": Case(
        "deepseek2",
        "deepseek_v2",
        {
            **DEEPSEEK,
            **GROUPS,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
        {
            **LATENT_KEYS,
            **GROUP_KEYS,
            **YARN_KEYS,
            "attention.q_lora_rank": 32,
            "expert_gating_func": 1,
            "expert_weights_scale": 16.0,
            "rope.scaling.yarn_log_multiplier": 0.0707,
        },
    ),
    "deepseek2-v3": Case(
        "deepseek2",
        "deepseek_v3",
        {
            **DEEPSEEK,
            **GROUPS,
            "n_routed_experts": 8,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        {
            **SPLIT_LATENT_KEYS,
            **GROUP_KEYS,
            **YARN_KEYS,
            "attention.q_lora_rank": 32,
            "expert_gating_func": 2,
            "expert_weights_scale": 2.5,
            "expert_weights_norm": True,
            "rope.scaling.yarn_log_multiplier": 0.1,
        },
    ),
    "deepseek2-moonlight": Case(
        "deepseek2",
        "deepseek_v3",
        {**DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446},
        {**SPLIT_LATENT_KEYS, "expert_weights_scale": 2.446, "expert_weights_norm": True},
    ),
    "deepseek2-dense": Case(
        "deepseek2",
        "deepseek_v2",
        {**DEEPSEEK, "first_k_dense_replace": 3, "q_lora_rank": None},
        {
            **SPLIT_LATENT_KEYS,
            "leading_dense_block_count": 3,
            "expert_shared_count": 0,
            "expert_count": None,
            "expert_used_count": None,
        },
    ),
}


def model_of(case: Case, **sizes: Any) -> PreTrainedModel:
    """Return a random model whose norms and biases differ from what a model is initialised with.

    ``sizes`` are members of its config in place of the case's.
    """
    torch.manual_seed(3)
    options = SIZES | case.options | sizes
    options = {name: value for name, value in options.items() if value is not None or name == "q_lora_rank"}
    config = CONFIG_MAPPING[case.model_type](**options)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.7, std=0.2)
        elif name.endswith(("bias", "sinks")):
            torch.nn.init.normal_(parameter, std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.2)
    return model
