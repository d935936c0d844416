"""Models whose weights are those of random blocks, in formats that gguf's own code dequantises and cannot quantise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from gguf_files import tensors_of
from numpy.typing import NDArray
from random_blocks import FLOAT16_AT, random_blocks
from transformers import PreTrainedModel

STANDARD_DEVIATION = 0.1

Blocks = dict[str, tuple[str, NDArray[np.uint8]]]
"""Formats and bytes of tensors, by their names in the file."""


def fill_with_blocks(
    model: PreTrainedModel, architecture: str, keys: Mapping[str, Any], kind: Callable[[str, int], str]
) -> Blocks:
    """Give the model the weights of random blocks, and return the blocks of the file that has them.

    ``kind`` names the format of a tensor by its name and columns; F32 leaves it as it is.
    """
    numbers = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # A model of serial numbers says where each number of the file is in the model.
    start = 0
    for tensor in model.state_dict().values():
        tensor.copy_(torch.arange(start, start + tensor.numel()).view(tensor.shape))
        start += tensor.numel()
    assert start < 1 << 24, "float32 has no more whole numbers"
    serials = tensors_of(model, architecture, keys)
    flat = torch.cat([tensor.flatten() for tensor in numbers.values()])
    blocks: Blocks = {}
    for seed, (name, places) in enumerate(serials.items()):
        own = kind(name, places.shape[-1]) if places.ndim > 1 and name.endswith("weight") else "F32"
        if own != "F32":
            raw, weights = _scaled_blocks(own, places.size // places.shape[-1], places.shape[-1], seed)
            flat[torch.from_numpy(places.astype(np.int64).flatten())] = torch.from_numpy(weights.flatten())
            blocks[name] = (own, raw.reshape(*places.shape[:-1], -1))
    parts = flat.split([tensor.numel() for tensor in numbers.values()])
    for tensor, part in zip(model.state_dict().values(), parts, strict=True):
        tensor.copy_(part.view(tensor.shape))
    return blocks


def _scaled_blocks(
    kind: str, rows: int, columns: int, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return blocks of weights with the standard deviation above, and the weights."""
    blocks, weights = random_blocks(kind, rows, columns, seed=seed, exponents=(122, 125))
    raw = blocks.numpy()
    if kind in FLOAT16_AT:
        size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
        each = raw.reshape(rows, -1, size)
        for offset in FLOAT16_AT[kind]:
            scales = each[:, :, offset : offset + 2].copy().view(np.float16)
            smaller = (scales * (STANDARD_DEVIATION / float(weights.std()))).astype(np.float16)
            each[:, :, offset : offset + 2] = smaller.view(np.uint8)
    return raw, dequantize(raw, GGMLQuantizationType[kind])
