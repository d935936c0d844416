"""Configs of tiny models that read images, and of their families' image processors."""

from __future__ import annotations

import functools
from typing import Any

from tokenizers import Tokenizer
from transformers import (
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlavaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

FAMILIES = (
    "internvl",
    "internvl_chat",
    "llava",
    "idefics3",
    "smolvlm",
    "gemma3",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
)
GRID_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families whose encoder reads whole images of any size, as patches in a grid."""

PATCH = 4
"""Width of every family's patches."""

SIZES = {
    "internvl": 24,
    "internvl_chat": 24,
    "llava": 16,
    "idefics3": 16,
    "smolvlm": 16,
    "gemma3": 32,
}
"""Width of a tile, or of an image."""

TOKENS = {"internvl": 9, "internvl_chat": 9, "llava": 16, "idefics3": 4, "smolvlm": 4, "gemma3": 16}
"""Placeholder tokens of a tile, or of an image."""

_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": PATCH,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 3,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}


def _internvl(tokenizer: Tokenizer, text: Any, vision: Any, options: Any) -> PreTrainedConfig:
    size = SIZES["internvl"]
    return InternVLConfig(
        **{
            "text_config": {"model_type": "qwen2", **_TEXT, "tie_word_embeddings": False} | text,
            "vision_config": {**_VISION, "image_size": size, "attention_bias": True} | vision,
            "image_token_id": tokenizer.token_to_id("<IMG_CONTEXT>"),
            "image_seq_length": TOKENS["internvl"],
            "tie_word_embeddings": text.get("tie_word_embeddings", False),
        }
        | options
    )


def _llava(tokenizer: Tokenizer, text: Any, vision: Any, options: Any) -> PreTrainedConfig:
    return LlavaConfig(
        **{
            "text_config": {"model_type": "llama", **_TEXT} | text,
            "vision_config": {"model_type": "clip_vision_model", **_VISION, "image_size": SIZES["llava"]}
            | vision,
            "image_token_index": tokenizer.token_to_id("<image>"),
            "image_seq_length": TOKENS["llava"],
        }
        | options
    )


def _tiles(config_class: Any, tokenizer: Tokenizer, text: Any, vision: Any, options: Any) -> PreTrainedConfig:
    config: PreTrainedConfig = config_class(
        **{
            "text_config": {"model_type": "llama", **_TEXT, "pad_token_id": 0} | text,
            "vision_config": {**_VISION, "image_size": SIZES["idefics3"]} | vision,
            "image_token_id": tokenizer.token_to_id("<image>"),
            "scale_factor": 2,
            "pad_token_id": 0,
        }
        | options
    )
    return config


def _gemma3(tokenizer: Tokenizer, text: Any, vision: Any, options: Any) -> PreTrainedConfig:
    own = {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 3,
        # An image's block fits into the window, the block and a sentence do not.
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    return Gemma3Config(
        **{
            "text_config": {**_TEXT, **own} | text,
            "vision_config": {"model_type": "siglip_vision_model", **_VISION, "image_size": SIZES["gemma3"]}
            | vision,
            "mm_tokens_per_image": TOKENS["gemma3"],
            "boi_token_index": tokenizer.token_to_id("<start_of_image>"),
            "eoi_token_index": tokenizer.token_to_id("<end_of_image>"),
            "image_token_index": tokenizer.token_to_id("<image_soft_token>"),
        }
        | options
    )


def _qwen(
    config_class: Any,
    own_text: dict[str, Any],
    own_vision: dict[str, Any],
    tokenizer: Tokenizer,
    text: Any,
    vision: Any,
    options: Any,
) -> PreTrainedConfig:
    tokens = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    config: PreTrainedConfig = config_class(
        **{
            "text_config": {**_TEXT, "bos_token_id": None, "eos_token_id": None} | own_text | text,
            "vision_config": _QWEN_VISION | own_vision | vision,
            **{field: tokenizer.token_to_id(token) for field, token in tokens.items()},
        }
        | options
    )
    return config


_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
_CONFIGS: dict[str, Any] = {
    "internvl": _internvl,
    "llava": _llava,
    "idefics3": functools.partial(_tiles, Idefics3Config),
    "smolvlm": functools.partial(_tiles, SmolVLMConfig),
    "gemma3": _gemma3,
    "qwen2_vl": functools.partial(
        _qwen,
        Qwen2VLConfig,
        {"rope_parameters": _MROPE},
        {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    ),
    # Two by two merged patches are a window, so that the grids of these tests have several, some of them cut.
    "qwen2_5_vl": functools.partial(
        _qwen,
        Qwen2_5_VLConfig,
        {"rope_parameters": _MROPE},
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": functools.partial(
        _qwen,
        Qwen3VLConfig,
        {
            "head_dim": 32,
            "num_hidden_layers": 3,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1],
        },
    ),
}

_HALF = [0.5, 0.5, 0.5]
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_COMMON: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
}
_QWEN_PROCESSOR = {
    **_COMMON,
    **_CLIP,
    "image_processor_type": "Qwen2VLImageProcessor",
    "resample": 3,
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48},
}


def _tile_processor(kind: str) -> dict[str, Any]:
    return {
        **_COMMON,
        "image_processor_type": f"{kind}ImageProcessor",
        "image_mean": _HALF,
        "image_std": _HALF,
        "resample": 1,
        "do_pad": True,
        "do_image_splitting": True,
        "size": {"longest_edge": 4 * SIZES["idefics3"]},
        "max_image_size": {"longest_edge": SIZES["idefics3"]},
    }


PROCESSORS: dict[str, dict[str, Any]] = {
    "internvl": {
        **_COMMON,
        **_IMAGENET,
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 12,
        "resample": 3,
        "size": {"height": SIZES["internvl"], "width": SIZES["internvl"]},
    },
    "llava": {
        **_COMMON,
        **_CLIP,
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "resample": 3,
        "size": {"shortest_edge": SIZES["llava"]},
        "crop_size": {"height": SIZES["llava"], "width": SIZES["llava"]},
    },
    "idefics3": _tile_processor("Idefics3"),
    "smolvlm": _tile_processor("SmolVLM"),
    "gemma3": {
        **_COMMON,
        "image_processor_type": "Gemma3ImageProcessor",
        "image_mean": _HALF,
        "image_std": _HALF,
        "resample": 2,
        "image_seq_length": TOKENS["gemma3"],
        "size": {"height": SIZES["gemma3"], "width": SIZES["gemma3"]},
    },
    "qwen2_vl": _QWEN_PROCESSOR,
    "qwen2_5_vl": _QWEN_PROCESSOR,
    "qwen3_vl": _QWEN_PROCESSOR,
}
"""Fields of preprocessor_config.json by family."""


def image_config(
    family: str,
    tokenizer: Tokenizer,
    text: dict[str, Any],
    vision: dict[str, Any],
    options: dict[str, Any],
) -> PreTrainedConfig:
    """Return a tiny model's config. The last three are fields in which it differs from the family's."""
    config: PreTrainedConfig = _CONFIGS[family](tokenizer, text, vision, options)
    return config
