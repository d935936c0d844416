"""Tiny random models that read images, in transformers' formats and in InternVL's original one.

model = save_image_model(directory, "llava")
prompt = model.prompt([5, 6], model.pixels(1), [7])
reference_logits(directory, prompt.token_ids, prompt.items)  # float32 [tokens, vocabulary]
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_tokenizers import (
    EOS,
    PLACEHOLDERS,
    save_slow_tokenizer,
    save_tokenizer,
    tiny_tokenizer,
    with_special_tokens,
)
from logitengine.link.messages import Array, PromptItem
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
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

NATIVE = "native"
"""Folder of an original InternVL checkpoint with transformers' model of the same weights."""

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


@dataclass(frozen=True)
class ImagePrompt:
    """A prompt's tokens, placeholders included, and the items that stand in their places."""

    token_ids: list[int]
    items: list[PromptItem]


@dataclass(frozen=True)
class ImagePixels:
    """Input of an encoder: float32 pixels, with the grid of a family that has one."""

    values: NDArray[np.float32]
    grid: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class ImageModel:
    """A model's directory, and what its prompts are made of."""

    directory: Path
    family: str
    image_token_id: int
    vocab_size: int

    def pixels(self, seed: int, grid: tuple[int, int, int] = (1, 4, 6)) -> ImagePixels:
        """Return random pixels. ``grid`` counts only in the families that have grids; it is in patches."""
        generator = np.random.default_rng(seed)
        if self.family in GRID_FAMILIES:
            shape: tuple[int, ...] = (int(np.prod(grid)), 3 * 2 * PATCH**2)
            return ImagePixels(generator.standard_normal(shape, dtype=np.float32), grid)
        shape = (3, SIZES[self.family], SIZES[self.family])
        return ImagePixels(generator.standard_normal(shape, dtype=np.float32))

    def num_tokens(self, pixels: ImagePixels) -> int:
        return TOKENS[self.family] if pixels.grid is None else int(np.prod(pixels.grid)) // 4

    def text(self, count: int, seed: int = 0) -> list[int]:
        """Return random tokens of plain text, none of which is special."""
        return [int(token) for token in np.random.default_rng(seed).integers(0, 256, count)]

    def prompt(self, *parts: list[int] | ImagePixels) -> ImagePrompt:
        """Return the prompt of texts, as token ids, and images in the order given."""
        token_ids: list[int] = []
        items: list[PromptItem] = []
        for part in parts:
            if isinstance(part, list):
                token_ids.extend(part)
                continue
            start = len(token_ids)
            token_ids.extend([self.image_token_id] * self.num_tokens(part))
            data = part.values.tobytes()
            items.append(
                PromptItem(
                    start=start,
                    stop=len(token_ids),
                    digest=hashlib.sha256(repr(part.grid).encode() + data).digest(),
                    pixels=Array("float32", part.values.shape, data),
                    grid=part.grid,
                )
            )
        return ImagePrompt(token_ids, items)


def save_image_model(
    directory: Path,
    family: str,
    *,
    tokenizer: Tokenizer | None = None,
    seed: int = 7,
    slow_tokenizer: bool = False,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    **options: Any,
) -> ImageModel:
    """Save a random model of ``family`` with everything that a server reads.

    Args:
        tokenizer: tokenizer without the family's special tokens; by default a tiny one of bytes.
        slow_tokenizer: whether an original InternVL checkpoint has its tokenizer as vocab.json and merges.txt.
        text: fields of the text model's config that differ from the tiny model's.
        vision: the same of the vision model's.
        options: fields of the config itself.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer(family) if tokenizer is None else with_special_tokens(tokenizer, family)
    vocab_size = tokenizer.get_vocab_size()
    native = "internvl" if family == "internvl_chat" else family
    config = _CONFIGS[native](tokenizer, {"vocab_size": vocab_size} | (text or {}), vision or {}, options)
    model = _random_model(config, seed)
    eos = tokenizer.token_to_id(EOS[family])
    model.generation_config.eos_token_id = [eos]
    if family == "internvl_chat":
        model.save_pretrained(directory / NATIVE)
        _save_original(directory, model, eos)
    else:
        model.save_pretrained(directory)
        (directory / "preprocessor_config.json").write_text(json.dumps(_PROCESSORS[family], indent=2))
    if slow_tokenizer:
        save_slow_tokenizer(tokenizer, directory)
    else:
        save_tokenizer(tokenizer, directory, family)
    return ImageModel(directory, family, tokenizer.token_to_id(PLACEHOLDERS[family]), vocab_size)


def _random_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Return a model in whose logits images count: no weight is left at zero, and no layer fades."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if id(parameter) in embeddings or parameter.ndim == 3:  # class and position embeddings
            nn.init.normal_(parameter, std=0.6)
        elif parameter.ndim >= 2:
            fan_in = parameter.shape[0] if "input_projection" in name else parameter[0].numel()
            nn.init.normal_(parameter, std=1.4 / fan_in**0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
        else:  # norms and layer scales
            nn.init.normal_(parameter, mean=0.8, std=0.3)
    model.tie_weights()
    return model.eval()


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


_PROCESSORS: dict[str, dict[str, Any]] = {
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


def _save_original(directory: Path, model: PreTrainedModel, eos: int) -> None:
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


@functools.lru_cache(maxsize=4)
def reference_model(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return transformers' own model of a checkpoint."""
    native = directory / NATIVE
    found = native if native.is_dir() else directory
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(
        found, dtype=dtype, attn_implementation="sdpa"
    )
    return model.eval()


@torch.inference_mode()
def reference_logits(
    directory: Path, token_ids: list[int], items: list[PromptItem], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the float32 logits [tokens, vocabulary] that transformers computes for a prompt with images."""
    model = reference_model(directory, dtype)
    family = model.config.model_type
    ids = torch.tensor([token_ids])
    inputs: dict[str, Any] = {}
    if items:
        pixels = [
            torch.frombuffer(bytearray(item.pixels.data), dtype=torch.float32).reshape(item.pixels.shape)
            for item in items
        ]
        is_image = torch.zeros_like(ids)
        for item in items:
            is_image[:, item.start : item.stop] = 1
        match family:
            case "qwen2_vl" | "qwen2_5_vl" | "qwen3_vl":
                inputs = {
                    "pixel_values": torch.cat(pixels).to(dtype),
                    "image_grid_thw": torch.tensor([item.grid for item in items]),
                    "mm_token_type_ids": is_image,
                }
            case "idefics3" | "smolvlm":
                inputs = {"pixel_values": torch.stack(pixels)[None].to(dtype)}
            case "gemma3":
                inputs = {"pixel_values": torch.stack(pixels).to(dtype), "token_type_ids": is_image}
            case _:
                inputs = {"pixel_values": torch.stack(pixels).to(dtype)}
    logits: torch.Tensor = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs
    ).logits
    return logits[0].float()


def internvl_model(directory: Path, family: str, base: Path, **options: Any) -> ImageModel:
    """Save an InternVL model whose tokenizer is that in the directory ``base`` and InternVL's nine tokens.

    Of Qwen2.5's tokens the first 151,646 are taken, which are Qwen2's.
    """
    document = json.loads((base / "tokenizer.json").read_bytes())
    if len(document["model"]["vocab"]) > QWEN2_TOKENS - 10:
        document["model"]["vocab"] = {
            token: at for token, at in document["model"]["vocab"].items() if at < QWEN2_TOKENS
        }
        document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < QWEN2_TOKENS]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    return save_image_model(directory, family, tokenizer=tokenizer, **options)


QWEN2_TOKENS = 151_646


__all__ = [
    "FAMILIES",
    "GRID_FAMILIES",
    "ImageModel",
    "ImagePixels",
    "ImagePrompt",
    "InternVLForConditionalGeneration",
    "internvl_model",
    "original_names",
    "reference_logits",
    "reference_model",
    "save_image_model",
]
