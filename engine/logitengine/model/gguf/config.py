"""From a GGUF file's metadata to the configuration of transformers' model. Free of torch.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and the conversion scripts of llama.cpp for what
they leave out because llama.cpp knows it by the architecture's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from logitengine.errors import CheckpointError
from logitengine.model.gguf.header import Header, StringArray
from logitengine.model.gguf.keys import Keys

EMBEDDING, HEAD = "token_embd.weight", "output.weight"

Config = dict[str, Any]


def model_config(header: Header) -> Config:
    """Return the members of transformers' config. Raises CheckpointError for what is not supported, by its name."""
    keys = Keys(header)
    if keys.architecture not in CONFIGS:
        raise CheckpointError(
            f"{header.path} cannot be served: architecture {keys.architecture} is not among {', '.join(sorted(CONFIGS))}"
        )
    config = _common(keys, header) | {"rope_parameters": _rope(keys)}
    config |= (_latent_heads if keys.architecture == "deepseek2" else _heads)(keys, config)
    config |= CONFIGS[keys.architecture](keys, config)
    keys.check_all_read()
    return config


def _common(keys: Keys, header: Header) -> Config:
    """Return what all architectures have."""
    hidden, heads, layers = (
        keys.size(key) for key in ("embedding_length", "attention.head_count", "block_count")
    )
    if layers > len(header.tensors):
        raise keys.damaged(f"it counts {layers} layers and has {len(header.tensors)} tensors")
    keys.must_be("attention.causal", True)
    return {
        "hidden_size": hidden,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": keys.size("context_length"),
        "vocab_size": _vocab_size(keys, header, hidden),
        "tie_word_embeddings": HEAD not in header.tensors,
        "bos_token_id": keys.token_id("bos_token_id"),
        "eos_token_id": _end_token_ids(keys),
        "pad_token_id": None,
    }


def _heads(keys: Keys, config: Config) -> Config:
    """Return the shape of attention whose keys and values are of one size."""
    heads = config["num_attention_heads"]
    kv_heads = keys.size("attention.head_count_kv", heads)
    head_dim = keys.size("attention.key_length", config["hidden_size"] // heads)
    if heads % kv_heads or head_dim % 2:
        raise keys.damaged(
            f"it counts {heads} heads and {kv_heads} for keys, with {head_dim} dimensions each"
        )
    keys.must_be("attention.value_length", head_dim)
    return {"num_key_value_heads": kv_heads, "head_dim": head_dim}


def _latent_heads(keys: Keys, config: Config) -> Config:
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


def _vocab_size(keys: Keys, header: Header, hidden: int) -> int:
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[1] != hidden:
        raise CheckpointError(f"{header.path} is damaged: it has no {EMBEDDING} with rows of {hidden}")
    rows = embedding.shape[0]
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, StringArray) or len(tokens) != rows:
        found = len(tokens) if isinstance(tokens, StringArray) else "none"
        raise CheckpointError(
            f"{header.path} is damaged: tokenizer.ggml.tokens has {found}, and {EMBEDDING} has {rows} rows"
        )
    keys.must_be("vocab_size", rows)
    return rows


def _end_token_ids(keys: Keys) -> list[int]:
    """Return the ids that end an answer: of a text, of a turn, of a message."""
    found = (keys.token_id(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id"))
    return sorted({token_id for token_id in found if token_id is not None})


def _rope(keys: Keys) -> Config:
    """Return the parameters of the rotary embedding, with its scaling."""
    rope: Config = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10000.0)}
    kind = keys.text("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    keys.integer("rope.scaling.original_context_length", 0)  # of no consequence without YaRN
    if kind == "none" and keys.has("rope.scale_linear"):
        kind = "linear"
    if kind == "linear" and factor != 1:
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return rope | _yarn(keys, factor)
    if kind != "linear":
        keys.must_be("rope.scaling.type", "none")
    if kind == "none":
        keys.must_be("rope.scaling.factor", 1.0, 0.0)
    return rope


def _yarn(keys: Keys, factor: float) -> Config:
    keys.must_be("rope.scaling.yarn_ext_factor", 1.0)
    scale = keys.number("rope.scaling.attn_factor", keys.number("rope.scaling.yarn_attn_factor", 1.0))
    original = keys.size("rope.scaling.original_context_length")
    if not keys.has("rope.scaling.factor"):
        raise keys.damaged("its rotary embedding is scaled by YaRN, and has no rope.scaling.factor")
    if factor < 1:
        keys.must_be("rope.scaling.factor", 1.0)
    found = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if scale != 1:
        found["attention_factor"] = scale * (0.1 * math.log(factor) + 1)
    return found


def _whole_rotary(keys: Keys, config: Config) -> None:
    keys.must_be("rope.dimension_count", config["head_dim"])


def _partial_rotary(keys: Keys, config: Config) -> Config:
    """Return the share of a head's dimensions that rotate."""
    share = keys.integer("rope.dimension_count", config["head_dim"]) / config["head_dim"]
    return {"rope_parameters": config["rope_parameters"] | {"partial_rotary_factor": share}}


SOFTMAX, SIGMOID, SOFTMAX_OF_USED = 1, 2, 3
"""Values of ``expert_gating_func``: what makes the experts' weights of the router's outputs."""


def _experts(keys: Keys, gating: int = SOFTMAX) -> None:
    """Check that the weights of experts are ``gating``'s, normed and unscaled, and that no expert is shared."""
    keys.must_be("expert_gating_func", gating)
    keys.must_be("expert_weights_norm", True)
    keys.must_be("expert_weights_scale", 1.0)
    keys.must_be("expert_shared_count", 0)
    keys.must_be("expert_shared_feed_forward_length", 0)


def _used_experts(keys: Keys) -> int:
    """Return how many experts a token takes."""
    experts, used = keys.size("expert_count"), keys.size("expert_used_count")
    if used > experts:
        raise keys.damaged(f"a token takes {used} of {experts} experts")
    return used


def _rms(keys: Keys) -> Config:
    return {"rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon")}


def _llama(keys: Keys, config: Config) -> Config:
    _whole_rotary(keys, config)
    experts = keys.integer("expert_count", 0)
    if experts:
        _experts(keys)
        # All files of this kind are Mixtral's; it norms the weights of the experts it takes.
        return _rms(keys) | {
            "model_type": "mixtral",
            "sliding_window": None,
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": experts,
            "num_experts_per_tok": _used_experts(keys),
        }
    keys.must_be("expert_used_count", 0)
    return _rms(keys) | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": keys.has_tensor("blk.0.attn_q.bias"),
        "mlp_bias": keys.has_tensor("blk.0.ffn_gate.bias"),
    }


def _granite(keys: Keys, config: Config) -> Config:
    _whole_rotary(keys, config)
    return _rms(keys) | {
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
    _whole_rotary(keys, config)
    return _rms(keys) | {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": keys.has_tensor("blk.0.attn_q.bias"),
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
    }


def _qwen2(keys: Keys, config: Config) -> Config:
    _whole_rotary(keys, config)
    return _rms(keys) | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": False,
    }


def _qwen3(keys: Keys, config: Config) -> Config:
    _whole_rotary(keys, config)
    return _rms(keys) | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": keys.has_tensor("blk.0.attn_q.bias"),
        "use_sliding_window": False,
    }


def _qwen3moe(keys: Keys, config: Config) -> Config:
    _whole_rotary(keys, config)
    _experts(keys)
    return _rms(keys) | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "use_sliding_window": False,
        "num_experts": keys.size("expert_count"),
        "num_experts_per_tok": _used_experts(keys),
        "moe_intermediate_size": keys.size("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(keys: Keys, config: Config) -> Config:
    _whole_rotary(keys, config)
    return _rms(keys) | {
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


def _softcap(keys: Keys, key: str, default: float = 0.0) -> float | None:
    return keys.number(key, default) or None


def _layer_types(keys: Keys, config: Config, period: int) -> list[str]:
    """Return the layers' kinds: the last of each ``period`` sees everything, unless the file lists them."""
    layers = config["num_hidden_layers"]
    listed = keys.array("attention.sliding_window_pattern")
    if listed is not None:
        is_sliding = [bool(value) for value in listed]
        if len(is_sliding) != layers:
            keys.must_be("attention.sliding_window_pattern")
    else:
        period = keys.integer("attention.sliding_window_pattern", period)
        is_sliding = [period > 0 and (layer + 1) % period > 0 for layer in range(layers)]
    return ["sliding_attention" if sliding else "full_attention" for sliding in is_sliding]


def _gemma2(keys: Keys, config: Config) -> Config:
    _whole_rotary(keys, config)
    return _rms(keys) | {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        # llama.cpp caps at these where a file does not say: old files do not.
        "attn_logit_softcapping": _softcap(keys, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": _softcap(keys, "final_logit_softcapping", 30.0),
        "sliding_window": keys.size("attention.sliding_window"),
        "layer_types": _layer_types(keys, config, 2),
        "query_pre_attn_scalar": _gemma_scale(config, GEMMA2_27B_LAYERS),
    }


def _gemma3(keys: Keys, config: Config) -> Config:
    _whole_rotary(keys, config)
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    return _rms(keys) | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": _softcap(keys, "attn_logit_softcapping"),
        "final_logit_softcapping": _softcap(keys, "final_logit_softcapping"),
        "sliding_window": keys.size("attention.sliding_window"),
        "layer_types": _layer_types(keys, config, 6),
        "query_pre_attn_scalar": _gemma_scale(config, GEMMA3_27B_LAYERS),
        # Layers with a window have their own, unscaled rotary embedding.
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
    }


def _phi3(keys: Keys, config: Config) -> Config:
    return (
        _rms(keys)
        | _partial_rotary(keys, config)
        | {
            "model_type": "phi3",
            "architectures": ["Phi3ForCausalLM"],
            "sliding_window": keys.integer("attention.sliding_window", 0) or None,
        }
    )


def _olmo2(keys: Keys, config: Config) -> Config:
    _whole_rotary(keys, config)
    return _rms(keys) | {
        "model_type": "olmo2",
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": keys.has_tensor("blk.0.attn_q.bias"),
    }


def _command_r(keys: Keys, config: Config) -> Config:
    _whole_rotary(keys, config)
    return {
        "model_type": "cohere",
        "architectures": ["CohereForCausalLM"],
        "layer_norm_eps": keys.number("attention.layer_norm_epsilon"),
        "logit_scale": keys.number("logit_scale"),
        "use_qk_norm": keys.has_tensor("blk.0.attn_q_norm.weight"),
        "attention_bias": keys.has_tensor("blk.0.attn_q.bias"),
    }


def _cohere2(keys: Keys, config: Config) -> Config:
    _whole_rotary(keys, config)
    return {
        "model_type": "cohere2",
        "architectures": ["Cohere2ForCausalLM"],
        "layer_norm_eps": keys.number("attention.layer_norm_epsilon"),
        "logit_scale": keys.number("logit_scale"),
        "attention_bias": keys.has_tensor("blk.0.attn_q.bias"),
        "sliding_window": keys.size("attention.sliding_window"),
        "layer_types": _layer_types(keys, config, 4),
    }


def _glm4(keys: Keys, config: Config) -> Config:
    return (
        _rms(keys)
        | _partial_rotary(keys, config)
        | {
            "model_type": "glm4",
            "architectures": ["Glm4ForCausalLM"],
            "attention_bias": keys.has_tensor("blk.0.attn_q.bias"),
        }
    )


def _ernie4_5(keys: Keys, config: Config) -> Config:
    _whole_rotary(keys, config)
    return _rms(keys) | {
        "model_type": "ernie4_5",
        "architectures": ["Ernie4_5ForCausalLM"],
        "use_bias": keys.has_tensor("blk.0.attn_q.bias"),
    }


def _gpt_oss(keys: Keys, config: Config) -> Config:
    _whole_rotary(keys, config)
    _experts(keys, SOFTMAX_OF_USED)
    keys.must_be("expert_feed_forward_length", config["intermediate_size"])
    rope = config["rope_parameters"]
    if rope["rope_type"] == "yarn":
        # The model was trained with bounds that are not whole numbers, which the file does not say.
        rope = rope | {"truncate": False}
    return _rms(keys) | {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "rope_parameters": rope,
        "sliding_window": keys.size("attention.sliding_window"),
        "layer_types": _layer_types(keys, config, 2),
        "num_local_experts": keys.size("expert_count"),
        "num_experts_per_tok": _used_experts(keys),
    }


DEEPSEEK_GROUPS = {160: (8, 3), 256: (8, 4)}
"""Groups of experts, and those that a token may take from, by the number of experts: DeepSeek V2's and V3's.

Files of old converters do not say.
"""


def _deepseek2(keys: Keys, config: Config) -> Config:
    layers, experts = config["num_hidden_layers"], keys.integer("expert_count", 0)
    first = keys.integer("leading_dense_block_count", 0)
    has_bias = keys.has_tensor(f"blk.{first}.exp_probs_b.bias")
    gating = keys.integer("expert_gating_func", SIGMOID if has_bias else SOFTMAX)
    keys.must_be("expert_gating_func", SOFTMAX, SIGMOID)
    keys.must_be("nextn_predict_layers", 0)
    generation = 3 if gating == SIGMOID else 2
    found = _rms(keys) | {
        "model_type": f"deepseek_v{generation}",
        "architectures": [f"DeepseekV{generation}ForCausalLM"],
        "rope_parameters": _deepseek_rope(keys, config),
        "attention_bias": False,
        "first_k_dense_replace": first,
        "moe_intermediate_size": keys.size("expert_feed_forward_length", 1),
    }
    if first >= layers:
        keys.must_be("expert_shared_count", 0)
        return found
    used = _used_experts(keys)
    num_groups, groups_used = DEEPSEEK_GROUPS.get(experts, (1, 1))
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


def _deepseek_rope(keys: Keys, config: Config) -> Config:
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
    "deepseek2": _deepseek2,
}
"""Members of the config beyond the common ones, by the architecture's name in the file."""
