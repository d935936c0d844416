"""Positions for rotary embeddings of three axes (time, height, width), as Qwen's image models use them."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from logitengine.link.messages import PromptItem


def rope_positions(num_tokens: int, items: Sequence[PromptItem]) -> NDArray[np.int64] | None:
    """Return the positions of a prompt's tokens, int64 [3, num_tokens]; None if no item has a grid.

    Text advances all axes by one. The tokens of an item keep the position of its beginning in time, and count rows and
    columns from there; what follows continues after the larger of the two. See Wang et al., "Qwen2-VL" (2024), 2.1.
    """
    if all(item.grid is None for item in items):
        return None
    positions = np.empty((3, num_tokens), dtype=np.int64)
    token, position = 0, 0
    for item in items:
        if item.grid is None:
            continue
        positions[:, token : item.start] = np.arange(position, position + item.start - token)
        position += item.start - token
        shape = token_grid(item.grid, item.stop - item.start)
        positions[:, item.start : item.stop] = np.indices(shape).reshape(3, -1) + position
        token, position = item.stop, position + max(shape)
    positions[:, token:] = np.arange(position, position + num_tokens - token)
    return positions


def token_grid(grid: tuple[int, int, int], num_tokens: int) -> tuple[int, int, int]:
    """Return the tokens of an item in time, height and width. ``grid`` counts patches, of which squares are merged."""
    time, height, width = grid
    merged = isqrt(time * height * width // num_tokens)
    return time, height // merged, width // merged
