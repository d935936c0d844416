"""The paged KV cache: per layer, one tensor of keys and one of values, cut into blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from logitengine.model.network.layer_shapes import LayerShape

CACHE_LINE_BYTES = 64


@dataclass(frozen=True, slots=True)
class PagedKVCache:
    """``keys[layer]`` and ``values[layer]`` are [num_blocks, Hkv, block_size, D].

    Keys may be transposed views.
    """

    keys: list[Tensor]
    values: list[Tensor]
    blocks: Tensor | None = None
    """[num_blocks, ...]: memory of all keys and values, where the data of all layers for one block is adjacent."""

    @property
    def num_blocks(self) -> int:
        return self.keys[0].shape[0]

    @property
    def block_size(self) -> int:
        return self.keys[0].shape[2]

    @classmethod
    def allocate(
        cls,
        shapes: list[LayerShape],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        transposes_keys: bool = False,
        joins_layers: bool = False,
    ) -> PagedKVCache:
        """Allocate a cache; with ``joins_layers`` it has ``blocks``.

        The first blocks then take one page of memory (a huge page where available), not one for every layer.
        """

        def keys(shape: LayerShape) -> tuple[int, ...]:
            return (shape.key_dim, block_size) if transposes_keys else (block_size, shape.key_dim)

        sizes = [
            (shape.num_kv_heads, *block)
            for shape in shapes
            for block in (keys(shape), (block_size, shape.value_dim))
        ]
        numels = [math.prod(size) for size in sizes]
        if joins_layers:
            blocks = _zeros(num_blocks * sum(numels), dtype, device).view(num_blocks, -1)
            parts = list(blocks.split(numels, dim=1))
        else:
            blocks = None
            parts = [_zeros(num_blocks * numel, dtype, device).view(num_blocks, -1) for numel in numels]
        tensors = [part.unflatten(1, size) for part, size in zip(parts, sizes, strict=True)]
        return cls(
            keys=[keys.transpose(2, 3) if transposes_keys else keys for keys in tensors[::2]],
            values=tensors[1::2],
            blocks=blocks,
        )


def _zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Unwritten slots are never attended to, but padded gathers read them, and a NaN there would survive a
    # zero weight.
    if device.type != "cpu":
        return torch.zeros(numel, dtype=dtype, device=device)
    # numpy leaves the zeroing to the kernel's fresh pages, so that no memory is spent until a block is used.
    nbytes = numel * dtype.itemsize
    memory = torch.from_numpy(np.zeros(nbytes + CACHE_LINE_BYTES, np.uint8))
    start = -memory.data_ptr() % CACHE_LINE_BYTES
    return memory[start : start + nbytes].view(dtype)


def bytes_per_block(shapes: list[LayerShape], block_size: int, dtype: torch.dtype) -> int:
    return sum(shape.numel_per_token for shape in shapes) * block_size * dtype.itemsize
