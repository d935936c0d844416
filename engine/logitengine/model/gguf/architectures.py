"""Members of transformers' config that differ from architecture to architecture. Free of torch.

What a file leaves out, because llama.cpp knows it by the architecture's name, is that of llama.cpp's conversion scripts.
"""

from __future__ import annotations

from collections.abc import Callable

from logitengine.model.gguf.config_parts import (
    SOFTMAX_OF_USED,
    Config,
    check_experts,
    layer_types,
    partial_rotary,
    rms,
    softcap,
    used_experts,
    whole_rotary,
)
from logitengine.model.gguf.deepseek import deepseek2
from logitengine.model.gguf.keys import Keys


def _llama(keys: Keys, config: Config) -> Config:
    whole_rotary(keys, config)
    experts = keys.integer("expert_count", 0)
    if experts:
        check_experts(keys)
        # All files of this kind are Mixtral's; it norms the weights of the experts it takes.
        return rms(keys) | {
            "model_type": "mixtral",
            "sliding_window": None,
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": experts,
            "num_experts_per_tok": used_experts(keys),
        }
    keys.must_be("expert_used_count", 0)
    return rms(keys) | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": keys.has_tensor("blk.0.attn_q.bias"),
        "mlp_bias": keys.has_tensor("blk.0.ffn_gate.bias"),
    }


def _granite(keys: Keys, config: Config) -> Config:
    whole_rotary(keys, config)
    return rms(keys) | {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": keys.has_tensor("blk.0.attn_q.bias"),
        "mlp_bias": keys.has_tensor("blk.0.ffn_gate.bias"),
        "embedding_multiplier": keys.number("embedding_scale", 1.0),
        "residual_multiplier": keys.number("residual_scale", 1.0),
        "attention_multiplier": keys.number("attention.scale", config["head_dim"] ** -0.5),
        "logits_scaling": keys.number("logit_scale", 1.0),
    }


def _smollm3(keys: Keys, config: Config) -> Config:
    whole_rotary(keys, config)
    return rms(keys) | {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": keys.has_tensor("blk.0.attn_q.bias"),
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
    }


def _qwen2(keys: Keys, config: Config) -> Config:
    whole_rotary(keys, config)
    return rms(keys) | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": False,
    }


def _qwen3(keys: Keys, config: Config) -> Config:
    whole_rotary(keys, config)
    return rms(keys) | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": keys.has_tensor("blk.0.attn_q.bias"),
        "use_sliding_window": False,
    }


def _qwen3moe(keys: Keys, config: Config) -> Config:
    whole_rotary(keys, config)
    check_experts(keys)
    return rms(keys) | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "use_sliding_window": False,
        "num_experts": keys.size("expert_count"),
        "num_experts_per_tok": used_experts(keys),
        "moe_intermediate_size": keys.size("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(keys: Keys, config: Config) -> Config:
    whole_rotary(keys, config)
    return rms(keys) | {
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    }


GEMMA2_27B_LAYERS, GEMMA3_27B_LAYERS = 46, 62
"""Layers of the models whose attention is scaled by the hidden size over the heads. The file does not say."""


def _gemma_scale(config: Config, layers: int) -> float:
    whole: float = config["hidden_size"] / config["num_attention_heads"]
    head_dim: float = config["head_dim"]
    return whole if config["num_hidden_layers"] == layers else head_dim


def _gemma2(keys: Keys, config: Config) -> Config:
    whole_rotary(keys, config)
    return rms(keys) | {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        # llama.cpp caps at these where a file does not say: old files do not.
        "attn_logit_softcapping": softcap(keys, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": softcap(keys, "final_logit_softcapping", 30.0),
        "sliding_window": keys.size("attention.sliding_window"),
        "layer_types": layer_types(keys, config, 2),
        "query_pre_attn_scalar": _gemma_scale(config, GEMMA2_27B_LAYERS),
    }


def _gemma3(keys: Keys, config: Config) -> Config:
    whole_rotary(keys, config)
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    return rms(keys) | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": softcap(keys, "attn_logit_softcapping"),
        "final_logit_softcapping": softcap(keys, "final_logit_softcapping"),
        "sliding_window": keys.size("attention.sliding_window"),
        "layer_types": layer_types(keys, config, 6),
        "query_pre_attn_scalar": _gemma_scale(config, GEMMA3_27B_LAYERS),
        # Layers with a window have their own, unscaled rotary embedding.
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
    }


def _phi3(keys: Keys, config: Config) -> Config:
    return (
        rms(keys)
        | partial_rotary(keys, config)
        | {
            "model_type": "phi3",
            "architectures": ["Phi3ForCausalLM"],
            "sliding_window": keys.integer("attention.sliding_window", 0) or None,
        }
    )


def _olmo2(keys: Keys, config: Config) -> Config:
    whole_rotary(keys, config)
    return rms(keys) | {
        "model_type": "olmo2",
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": keys.has_tensor("blk.0.attn_q.bias"),
    }


def _command_r(keys: Keys, config: Config) -> Config:
    whole_rotary(keys, config)
    return {
        "model_type": "cohere",
        "architectures": ["CohereForCausalLM"],
        "layer_norm_eps": keys.number("attention.layer_norm_epsilon"),
        "logit_scale": keys.number("logit_scale"),
        "use_qk_norm": keys.has_tensor("blk.0.attn_q_norm.weight"),
        "attention_bias": keys.has_tensor("blk.0.attn_q.bias"),
    }


def _cohere2(keys: Keys, config: Config) -> Config:
    whole_rotary(keys, config)
    return {
        "model_type": "cohere2",
        "architectures": ["Cohere2ForCausalLM"],
        "layer_norm_eps": keys.number("attention.layer_norm_epsilon"),
        "logit_scale": keys.number("logit_scale"),
        "attention_bias": keys.has_tensor("blk.0.attn_q.bias"),
        "sliding_window": keys.size("attention.sliding_window"),
        "layer_types": layer_types(keys, config, 4),
    }


def _glm4(keys: Keys, config: Config) -> Config:
    return (
        rms(keys)
        | partial_rotary(keys, config)
        | {
            "model_type": "glm4",
            "architectures": ["Glm4ForCausalLM"],
            "attention_bias": keys.has_tensor("blk.0.attn_q.bias"),
        }
    )


def _ernie4_5(keys: Keys, config: Config) -> Config:
    whole_rotary(keys, config)
    return rms(keys) | {
        "model_type": "ernie4_5",
        "architectures": ["Ernie4_5ForCausalLM"],
        "use_bias": keys.has_tensor("blk.0.attn_q.bias"),
    }


def _gpt_oss(keys: Keys, config: Config) -> Config:
    whole_rotary(keys, config)
    check_experts(keys, SOFTMAX_OF_USED)
    keys.must_be("expert_feed_forward_length", config["intermediate_size"])
    rope = config["rope_parameters"]
    if rope["rope_type"] == "yarn":
        # The model was trained with bounds that are not whole numbers, which the file does not say.
        rope = rope | {"truncate": False}
    return rms(keys) | {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "rope_parameters": rope,
        "sliding_window": keys.size("attention.sliding_window"),
        "layer_types": layer_types(keys, config, 2),
        "num_local_experts": keys.size("expert_count"),
        "num_experts_per_tok": used_experts(keys),
    }


CONFIGS: dict[str, Callable[[Keys, Config], Config]] = {
    "llama": _llama,
    "granite": _granite,
    "smollm3": _smollm3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "command-r": _command_r,
    "cohere2": _cohere2,
    "glm4": _glm4,
    "ernie4_5": _ernie4_5,
    "gpt-oss": _gpt_oss,
    "deepseek2": deepseek2,
}
"""Members of the config beyond the common ones, by the architecture's name in the file."""
