"""Items from arrays of pixel values."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from logitengine.images.messages import PreparedItem
from logitengine.link.messages import Array

DIGEST_BYTES = 32

Grid = tuple[int, int, int]


def item_of(pixels: npt.NDArray[np.float32], num_tokens: int, grid: Grid | None = None) -> PreparedItem:
    """Return the item of pixel values, [channels, height, width] or [patches, numbers] with a grid."""
    pixels = np.ascontiguousarray(pixels, dtype="<f4")
    data = pixels.data.cast("B")
    head = f"{pixels.dtype.name} {pixels.shape} {grid}\n"
    digest = blake2b(head.encode(), digest_size=DIGEST_BYTES)
    digest.update(data)
    return PreparedItem(
        pixels=Array("float32", pixels.shape, data), digest=digest.digest(), num_tokens=num_tokens, grid=grid
    )
