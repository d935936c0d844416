"""The paged KV cache: per layer, one tensor of keys and one of values, cut into blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a layer stores per token, how far back it looks (None: to the beginning), and how it caps its scores.

    The sizes of a key and of a value differ in some architectures.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    sliding_window: int | None = None
    softcap: float | None = None

    @property
    def numel_per_token(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True)
class PagedKVCache:
    """``keys[layer]`` and ``values[layer]`` are [num_blocks, Hkv, block_size, D]; keys may be so by transposition."""

    keys: list[Tensor]
    values: list[Tensor]

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
    ) -> PagedKVCache:
        # Unwritten slots are never attended to, but padded gathers read them: NaN there would survive a zero weight.
        def blocks(shape: LayerShape, *block: int) -> Tensor:
            size = (num_blocks, shape.num_kv_heads, *block)
            if device.type != "cpu":
                return torch.zeros(size, dtype=dtype, device=device)
            # numpy leaves the zeroing to the kernel's fresh pages: no memory is spent until a block is used.
            return (
                torch.from_numpy(np.zeros(math.prod(size) * dtype.itemsize, np.uint8)).view(dtype).view(size)
            )

        def keys(shape: LayerShape) -> Tensor:
            if transposes_keys:
                return blocks(shape, shape.key_dim, block_size).transpose(2, 3)
            return blocks(shape, block_size, shape.key_dim)

        return cls(
            keys=[keys(shape) for shape in shapes],
            values=[blocks(shape, block_size, shape.value_dim) for shape in shapes],
        )


def bytes_per_block(shapes: list[LayerShape], block_size: int, dtype: torch.dtype) -> int:
    return sum(shape.numel_per_token for shape in shapes) * block_size * dtype.itemsize


@dataclass(slots=True)
class ShapeProbe:
    """Stands in for the cache in one forward pass and records what each layer would have stored."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)

    def record(
        self, layer: int, key: Tensor, value: Tensor, sliding_window: int | None, softcap: float | None
    ) -> None:
        """``key`` and ``value`` are [1, Hkv, T, D]."""
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3], sliding_window, softcap)

    def in_order(self) -> list[LayerShape]:
        """Raises ValueError if some layer did not come through our attention function."""
        if sorted(self.shapes) != list(range(len(self.shapes))) or not self.shapes:
            raise ValueError(
                "this architecture has layers that do not use the attention interface "
                f"(attention layers seen: {sorted(self.shapes)})"
            )
        return [self.shapes[layer] for layer in range(len(self.shapes))]
