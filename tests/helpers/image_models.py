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
from image_configs import FAMILIES, GRID_FAMILIES, PATCH, PROCESSORS, SIZES, TOKENS, image_config
from image_tokenizers import (
    EOS,
    PLACEHOLDERS,
    save_slow_tokenizer,
    save_tokenizer,
    tiny_tokenizer,
    token_id,
    with_special_tokens,
)
from internvl_original import save_original
from logitengine.link.messages import Array, PromptItem
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

__all__ = [
    "FAMILIES",
    "GRID_FAMILIES",
    "ImageModel",
    "ImagePixels",
    "ImagePrompt",
    "internvl_model",
    "reference_logits",
    "reference_model",
    "save_image_model",
]

NATIVE = "native"
"""Folder of an original InternVL checkpoint with transformers' model of the same weights."""

QWEN2_TOKENS = 151_646
"""Tokens of Qwen2's tokenizer, which are Qwen2.5's first."""


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
    config = image_config(native, tokenizer, {"vocab_size": vocab_size} | (text or {}), vision or {}, options)
    model = _random_model(config, seed)
    eos = token_id(tokenizer, EOS[family])
    model.generation_config.eos_token_id = [eos]
    if family == "internvl_chat":
        model.save_pretrained(directory / NATIVE)
        save_original(directory, model, eos)
    else:
        model.save_pretrained(directory)
        (directory / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[family], indent=2))
    if slow_tokenizer:
        save_slow_tokenizer(tokenizer, directory)
    else:
        save_tokenizer(tokenizer, directory, family)
    return ImageModel(directory, family, token_id(tokenizer, PLACEHOLDERS[family]), vocab_size)


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
    model.eval()
    return model


@functools.lru_cache(maxsize=4)
def reference_model(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return transformers' own model of a checkpoint."""
    native = directory / NATIVE
    found = native if native.is_dir() else directory
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(
        found, dtype=dtype, attn_implementation="sdpa"
    )
    model.eval()
    return model


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
