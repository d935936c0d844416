"""Writer of InternVL's original checkpoint format, from a model of transformers' with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel


def original_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a transformers InternVL model under the names of the original format."""
    renamed = {
        "vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
        "vision_tower.embeddings.patch_embeddings.projection": "vision_model.embeddings.patch_embedding",
        "vision_tower.embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
        "vision_tower.encoder.layer": "vision_model.encoder.layers",
        "attention.projection_layer": "attn.proj",
        "attention.q_norm": "attn.q_norm",
        "attention.k_norm": "attn.k_norm",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "lambda_1": "ls1",
        "lambda_2": "ls2",
        "multi_modal_projector.layer_norm": "mlp1.0",
        "multi_modal_projector.linear_1": "mlp1.1",
        "multi_modal_projector.linear_2": "mlp1.3",
    }
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        part = name.removeprefix("model.")
        if part.startswith(("language_model.", "lm_head.")):
            tail = part.removeprefix("language_model.")
            found["language_model." + (tail if tail.startswith("lm_head.") else "model." + tail)] = tensor
            continue
        for ours, original in renamed.items():
            part = part.replace(ours, original)
        if ".q_proj." in part:
            siblings = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[part.replace("attention.q_proj", "attn.qkv")] = torch.cat(siblings)
        elif ".k_proj." not in part and ".v_proj." not in part:
            found[part] = tensor
    return found


def save_original(directory: Path, model: PreTrainedModel, eos: int) -> None:
    config: Any = model.config
    vision = config.vision_config
    document = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        },
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": True,
        "force_image_size": vision.image_size[0],
        "llm_config": config.text_config.to_dict()
        | {"architectures": ["Qwen2ForCausalLM"], "_attn_implementation": "flash_attention_2"},
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "ps_version": "v2",
        "select_layer": config.vision_feature_layer,
        "template": "Hermes-2",
        "torch_dtype": "float32",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "hidden_act": vision.hidden_act,
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size[0],
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "model_type": "intern_vit_6b",
            "norm_type": vision.norm_type,
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": vision.patch_size[0],
            "qk_normalization": vision.use_qk_norm,
            "qkv_bias": vision.attention_bias,
            "torch_dtype": "float32",
            "use_flash_attn": True,
        },
    }
    (directory / "config.json").write_text(json.dumps(document, indent=2))
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    weights = {name: tensor.contiguous() for name, tensor in original_names(state).items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos]}))
