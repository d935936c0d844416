"""What the config.json of InternVL's original checkpoint format says. Free of torch and transformers.

The format is that of https://github.com/OpenGVLab/InternVL, ``model_type`` "internvl_chat". A field that is absent has
the value that the format's own code gives it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from logitengine.errors import CheckpointError

MODEL_TYPE = "internvl_chat"
IMAGE_TOKEN = "<IMG_CONTEXT>"  # noqa: S105 - no password
END_TOKEN = "<|im_end|>"  # noqa: S105
"""End of a turn in both known templates."""

TEMPLATES = ("Hermes-2", "internvl2_5")
"""Names of the conversations that are known here: ChatML with InternVL's system text. The format's own are code."""

QK_NORM_EPS = 1e-6
"""What transformers' InternVL computes the norms of queries and keys with."""


class OriginalVision(Struct, frozen=True, kw_only=True):
    """``vision_config``. The defaults are InternViT-6B's."""

    num_channels: int = 3
    patch_size: int = 14
    image_size: int = 224
    qkv_bias: bool = False
    hidden_size: int = 3200
    num_attention_heads: int = 25
    intermediate_size: int = 12800
    qk_normalization: bool = True
    num_hidden_layers: int = 48
    hidden_act: str = "gelu"
    norm_type: Literal["layer_norm", "rms_norm"] = "rms_norm"
    layer_norm_eps: float = 1e-6


class OriginalConfig(Struct, frozen=True, kw_only=True):
    """Fields of config.json that decide what is computed.

    Attributes:
        llm_config: the text model's own config.
        select_layer: index of the vision model's hidden states, [embeddings, *layers], that are projected.
        force_image_size: width of a tile where it is not the vision model's own.
        downsample_ratio: factor on the height and the width of a tile's features.
        template: name of the conversation.
        dynamic_image_size: whether an image is cut into several tiles.
        use_thumbnail: whether the whole image comes after its tiles where there are several.
        ps_version: order of pixels in which features are downsampled.
    """

    vision_config: OriginalVision = OriginalVision()
    llm_config: dict[str, Any] = {}
    select_layer: int = -1
    force_image_size: int | None = None
    downsample_ratio: float = 0.5
    template: str | None = None
    dynamic_image_size: bool = False
    use_thumbnail: bool = False
    pad2square: bool = False
    ps_version: str = "v1"
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 6
    use_backbone_lora: int = 0
    use_llm_lora: int = 0

    @property
    def image_size(self) -> int:
        """Width and height of a tile, in pixels."""
        return self.force_image_size or self.vision_config.image_size

    @property
    def num_tokens(self) -> int:
        """Placeholder tokens of a tile."""
        return int((self.image_size // self.vision_config.patch_size) ** 2 * self.downsample_ratio**2)

    @property
    def text_model(self) -> str:
        """The text model's ``model_type``; its architecture where it names no type."""
        named = self.llm_config.get("model_type")
        return str(named or next(iter(self.llm_config.get("architectures") or []), "none"))


def is_original(config: dict[str, Any]) -> bool:
    """Tell whether config.json is of the original format."""
    return config.get("model_type") == MODEL_TYPE


def original_config(config: dict[str, Any]) -> OriginalConfig:
    """Return what config.json says. Raises CheckpointError for what cannot be served, by name."""
    try:
        found = msgspec.convert(config, OriginalConfig)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"InternVL's config.json: {error}") from error
    for problem, applies in _problems(found).items():
        if applies:
            raise CheckpointError(f"InternVL's config.json: {problem}")
    return found


def _problems(config: OriginalConfig) -> dict[str, bool]:
    vision = config.vision_config
    side = config.image_size // vision.patch_size if vision.patch_size > 0 else 0
    inverse = 1 / config.downsample_ratio if config.downsample_ratio > 0 else 0.0
    layers = vision.num_hidden_layers
    return {
        f"llm_config is of {config.text_model}, which transformers does not have; "
        "InternVL models of Qwen2's or Llama's family are served, such as InternVL2-1B": "internlm2"
        in config.text_model.lower(),
        "llm_config names no model_type": config.text_model == "none",
        f"ps_version {config.ps_version!r}: only 'v2' is served": config.ps_version != "v2",
        "pad2square is true: images are only served in tiles of their own proportions": config.pad2square,
        f"template {config.template!r} is code of the checkpoint's own; known are {', '.join(TEMPLATES)}": (
            config.template not in TEMPLATES
        ),
        "use_backbone_lora and use_llm_lora must be 0: merge the adapters into the weights first": bool(
            config.use_backbone_lora or config.use_llm_lora
        ),
        f"downsample_ratio {config.downsample_ratio} is not 1 over a whole number": inverse < 1
        or inverse != int(inverse),
        f"a tile of {config.image_size} pixels has {side} patches of {vision.patch_size} a side, which do not "
        f"divide by {inverse:g}": side == 0 or (inverse >= 1 and side % inverse != 0),
        f"select_layer {config.select_layer} is not among the hidden states of {layers} layers, "
        f"{-layers - 1} to {layers}": not -layers - 1 <= config.select_layer <= layers,
        f"qk_normalization with layer_norm_eps {vision.layer_norm_eps}: only {QK_NORM_EPS} is served": (
            vision.qk_normalization and vision.layer_norm_eps != QK_NORM_EPS
        ),
    }


def added_token_id(directory: Path, token: str) -> int:
    """Return the id of an added token of the tokenizer in ``directory``. Raises CheckpointError where there is none."""
    for name in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json"):
        path = directory / name
        if path.is_file() and (found := _added_tokens(name, path).get(token)) is not None:
            return found
    raise CheckpointError(f"the tokenizer in {directory} has no added token {token}, which stands for images")


def _added_tokens(name: str, path: Path) -> dict[str, int]:
    try:
        document = json.loads(path.read_bytes())
        match name:
            case "tokenizer.json":
                return {token["content"]: int(token["id"]) for token in document.get("added_tokens", [])}
            case "added_tokens.json":
                return {token: int(at) for token, at in document.items()}
            case _:
                decoder = document.get("added_tokens_decoder", {})
                return {token["content"]: int(at) for at, token in decoder.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as a tokenizer's file: {error!r}") from error
