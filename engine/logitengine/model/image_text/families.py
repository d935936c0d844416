"""Architectures whose images are served, and what their encoders read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig

from logitengine.link.messages import EncoderInfo

GRID_FAMILIES = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl"})
"""Families whose encoder reads any resolution, and whose rotary positions have three axes."""

JOINING_FAMILIES = frozenset({"gemma3"})
"""Families in which the tokens of an image attend to each other in both directions."""

INTERNVL_CHAT = "internvl_chat"
"""InternVL in its original format."""

SHUFFLING_FAMILIES = frozenset({"idefics3", "smolvlm"})
FAMILIES = GRID_FAMILIES | JOINING_FAMILIES | SHUFFLING_FAMILIES | {"internvl", INTERNVL_CHAT, "llava"}

LLAVA_TOWERS = frozenset({"clip_vision_model", "siglip_vision_model"})


def encoder_info(config: PreTrainedConfig, family: str, max_tokens: int) -> EncoderInfo:
    """Return what the encoder of a model reads. ``family`` is the checkpoint's own name of its format.

    ``max_tokens`` bounds an item where the encoder reads any resolution.

    Raises ValueError for an encoder that is not served.
    """
    vision = config.vision_config
    if family in GRID_FAMILIES:
        channels = getattr(vision, "in_channels", None) or vision.in_chans
        patch = channels * vision.temporal_patch_size * vision.patch_size**2
        return EncoderInfo(
            family=family,
            pixels_shape=(patch,),
            merge_size=vision.spatial_merge_size,
            max_tokens=max_tokens,
            depth=len(getattr(vision, "deepstack_visual_indexes", ())),
        )
    (height, width), (patch_height, patch_width) = _pair(vision.image_size), _pair(vision.patch_size)
    patches = (height // patch_height) * (width // patch_width)
    num_tokens = _num_tokens(config, patches)
    return EncoderInfo(
        family=family,
        pixels_shape=(getattr(vision, "num_channels", 3), height, width),
        num_tokens=num_tokens,
        max_tokens=num_tokens,
        joins_tokens=family in JOINING_FAMILIES,
    )


def _num_tokens(config: Any, patches: int) -> int:
    match config.model_type:
        case "internvl":
            return int(patches * config.downsample_ratio**2)
        case "idefics3" | "smolvlm":
            return int(patches // config.scale_factor**2)
        case "gemma3":
            return int(config.mm_tokens_per_image)
        case "llava":
            tower = config.vision_config.model_type
            if tower not in LLAVA_TOWERS:
                raise ValueError(f"LLaVA with a vision tower of the type {tower} is not served")
            has_class_token = tower == "clip_vision_model"
            drops_first = config.vision_feature_select_strategy == "default"
            return int(patches + has_class_token - drops_first)
        case family:
            raise ValueError(f"images of {family} models are not served")


def _pair(size: int | Iterable[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
