"""Loading of InternVL's original checkpoint format into transformers' InternVL, without the checkpoint's code.

Both are one network. The original names its weights differently and keeps a vision layer's queries, keys and values in
one matrix: https://github.com/OpenGVLab/InternVL/tree/main/internvl_chat/internvl/model/internvl_chat
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedConfig,
)
from transformers.initialization import no_init_weights

from logitengine.errors import CheckpointError
from logitengine.model.checkpoint.safetensors_files import COPIED_BUFFERS, some, weight_files
from logitengine.model.image_text.internvl_format import (
    END_TOKEN,
    IMAGE_TOKEN,
    OriginalConfig,
    added_token_id,
    original_config,
)

NOT_OF_THE_TEXT_MODEL = frozenset(
    {
        "model_type",
        "architectures",
        "auto_map",
        "_attn_implementation",
        "_name_or_path",
        "transformers_version",
    }
    | {"torch_dtype", "dtype", "use_bfloat16", "attn_implementation", "_attn_implementation_autoset"}
)
"""Fields of ``llm_config`` that say where the model came from and how its authors ran it."""

VISION = "model.vision_tower."
PROJECTOR = "model.multi_modal_projector."
POSITIONS = VISION + "embeddings.position_embeddings"
LETTERS = ("q", "k", "v")
RENAMED = (
    (r"language_model\.model\.(.+)", r"model.language_model.\1"),
    (r"language_model\.lm_head\.(.+)", r"lm_head.\1"),
    (r"vision_model\.embeddings\.class_embedding", VISION + "embeddings.cls_token"),
    (r"vision_model\.embeddings\.patch_embedding\.(.+)", VISION + r"embeddings.patch_embeddings.projection.\1"),
    (r"vision_model\.embeddings\.position_embedding", POSITIONS),
    (r"vision_model\.encoder\.layers\.(\d+)\.attn\.proj\.(.+)", VISION + r"encoder.layer.\1.attention.projection_layer.\2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.attn\.(q|k)_norm\.(.+)", VISION + r"encoder.layer.\1.attention.\2_norm.\3"),
    (r"vision_model\.encoder\.layers\.(\d+)\.mlp\.(.+)", VISION + r"encoder.layer.\1.mlp.\2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.norm1\.(.+)", VISION + r"encoder.layer.\1.layernorm_before.\2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.norm2\.(.+)", VISION + r"encoder.layer.\1.layernorm_after.\2"),
    (r"vision_model\.encoder\.layers\.(\d+)\.ls(1|2)", VISION + r"encoder.layer.\1.lambda_\2"),
    (r"mlp1\.0\.(.+)", PROJECTOR + r"layer_norm.\1"),
    (r"mlp1\.1\.(.+)", PROJECTOR + r"linear_1.\1"),
    (r"mlp1\.3\.(.+)", PROJECTOR + r"linear_2.\1"),
)  # fmt: skip
"""Patterns of the original names, and transformers' names."""

FUSED = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.attn\.qkv\.(weight|bias)")


def config_of(directory: Path) -> InternVLConfig:
    """Return transformers' config of the model in ``directory``.

    Raises CheckpointError for a model that cannot be served.
    """
    original = original_config(json.loads((directory / "config.json").read_bytes()))
    text_config = _text_config(original)
    vision = original.vision_config
    try:
        vision_config = InternVLVisionConfig(
            hidden_size=vision.hidden_size,
            num_hidden_layers=vision.num_hidden_layers,
            num_attention_heads=vision.num_attention_heads,
            intermediate_size=vision.intermediate_size,
            attention_bias=vision.qkv_bias,
            use_qk_norm=vision.qk_normalization,
            hidden_act=vision.hidden_act,
            norm_type=vision.norm_type,
            layer_norm_eps=vision.layer_norm_eps,
            image_size=original.image_size,
            patch_size=vision.patch_size,
            num_channels=vision.num_channels,
            use_mean_pooling=True,  # the original has no norm after its last layer, which this leaves out
        )
        return InternVLConfig(
            text_config=text_config,
            vision_config=vision_config,
            image_token_id=_image_token_id(directory, text_config),
            image_seq_length=original.num_tokens,
            downsample_ratio=original.downsample_ratio,
            projector_hidden_act="gelu",
            vision_feature_layer=original.select_layer,
            vision_feature_select_strategy="default",
            tie_word_embeddings=bool(text_config.tie_word_embeddings),
            architectures=["InternVLForConditionalGeneration"],
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory}: config.json: {error}") from error


def _text_config(original: OriginalConfig) -> PreTrainedConfig:
    name = original.text_model
    # The mapping loads its classes when they are taken, so that ``get`` finds none.
    if name not in CONFIG_MAPPING or CONFIG_MAPPING[name] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(f"llm_config is of {name}, which transformers has no text model for")
    fields = {
        field: value for field, value in original.llm_config.items() if field not in NOT_OF_THE_TEXT_MODEL
    }
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[name](**fields)
    except Exception as error:  # its own checks raise exceptions of several libraries
        raise CheckpointError(f"llm_config is not a config of {name}: {error}") from error
    return config


def _image_token_id(directory: Path, text_config: PreTrainedConfig) -> int:
    found = added_token_id(directory, IMAGE_TOKEN)
    vocab_size: int = text_config.vocab_size
    if found >= vocab_size:
        raise CheckpointError(
            f"the tokenizer in {directory} has {IMAGE_TOKEN} at {found}, beyond the model's vocab_size {vocab_size}"
        )
    return found


def load_internvl_chat(
    directory: Path, dtype: torch.dtype, attn_implementation: str | dict[str, str] = "sdpa"
) -> InternVLForConditionalGeneration:
    """Load the model in ``directory`` into memory of the host, tensor by tensor.

    Raises CheckpointError for a model that cannot be served, and for weights that are missing, unknown or of another
    shape than the config's.
    """
    original = original_config(json.loads((directory / "config.json").read_bytes()))
    config = config_of(directory)
    model = _empty_model(config, dtype, attn_implementation)
    model.tie_weights()
    _fill(model, directory, original)
    model.generation_config = _generation_config(directory)
    model.eval().requires_grad_(requires_grad=False)
    return model


def _empty_model(
    config: InternVLConfig, dtype: torch.dtype, attn_implementation: str | dict[str, str]
) -> InternVLForConditionalGeneration:
    """Return a model without values: its parameters are memory that was never touched, its buffers are computed."""
    try:
        with no_init_weights():
            model: InternVLForConditionalGeneration = InternVLForConditionalGeneration._from_config(  # noqa: SLF001 - what every auto class calls
                config, dtype=dtype, attn_implementation=attn_implementation
            )
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"no InternVL model can be built from config.json: {error}") from error
    return model


def transformers_names(name: str) -> list[str]:
    """Return transformers' names for one of the original: three for a matrix of queries, keys and values.

    A name that is unknown has none.
    """
    if (fused := FUSED.fullmatch(name)) is not None:
        return [f"{VISION}encoder.layer.{fused[1]}.attention.{letter}_proj.{fused[2]}" for letter in LETTERS]
    for pattern, renamed in RENAMED:
        if (match := re.fullmatch(pattern, name)) is not None:
            return [match.expand(renamed)]
    return []


def _fill(model: nn.Module, directory: Path, original: OriginalConfig) -> None:
    targets = dict(model.named_parameters(remove_duplicate=False))
    is_tied = "lm_head.weight" not in dict(model.named_parameters())
    missing, unknown = set(targets), []
    if is_tied:
        missing.discard("lm_head.weight")
    for name, tensor in _weights(directory):
        names = transformers_names(name)
        if COPIED_BUFFERS.fullmatch(name) or (is_tied and names == ["lm_head.weight"]):
            continue
        if not names or not targets.keys() >= set(names):
            unknown.append(name)
            continue
        missing.difference_update(names)
        parts = tensor.chunk(len(names)) if len(names) > 1 else [tensor]
        for target, part in zip(names, parts, strict=True):
            value = _resized(part, original) if target == POSITIONS else part
            if targets[target].shape != value.shape:
                raise CheckpointError(
                    f"{directory}: {name} has the shape {list(tensor.shape)}, which does not fit config.json"
                )
            with torch.no_grad():
                targets[target].copy_(value)
    if missing:
        raise CheckpointError(f"the weights in {directory} lack: {some(missing)}")
    if unknown:
        raise CheckpointError(f"the weights in {directory} hold unknown tensors: {some(unknown)}")


def _resized(positions: Tensor, original: OriginalConfig) -> Tensor:
    """Return the position embeddings [1, 1 + patches, hidden] for tiles of the size that config.json forces.

    The original interpolates them, in float32, each time that it reads a tile.
    """
    vision = original.vision_config
    before, after = (size // vision.patch_size for size in (vision.image_size, original.image_size))
    if before == after or positions.ndim != 3 or positions.shape[1] != before**2 + 1:
        return positions
    grid = positions[:, 1:].float().reshape(1, before, before, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    patches = grid.flatten(2).transpose(1, 2).to(positions.dtype)
    return torch.cat([positions[:, :1], patches], dim=1)


def _weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint's tensors under their original names, one in memory at a time."""
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no dict
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error


def _generation_config(directory: Path) -> GenerationConfig:
    """Return the checkpoint's own, which ends at the end of a turn where it does not say at which tokens."""
    found: Any = GenerationConfig()
    if (directory / "generation_config.json").is_file():
        try:
            found = GenerationConfig.from_pretrained(directory)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{directory}: generation_config.json: {error}") from error
    if found.eos_token_id is None:
        found.eos_token_id = [added_token_id(directory, END_TOKEN)]
    config: GenerationConfig = found
    return config
