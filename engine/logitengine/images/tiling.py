"""Tiles of InternVL's original checkpoints: the "dynamic preprocessing" of https://arxiv.org/abs/2404.16821, section 3.2.

An image is stretched to a grid of square tiles whose aspect ratio is closest to its own, and cut. If there is more than one
tile, a thumbnail of the whole image follows them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Mean and deviation of ImageNet's pixels in red, green and blue, between 0 and 1."""


@dataclass(frozen=True)
class Tiling:
    """How a checkpoint cuts images.

    Attributes:
        size: side of a tile in pixels.
        min_tiles: least tiles of a grid, unless an image may have fewer.
        max_tiles: most tiles of a grid, in which the thumbnail does not count.
        use_thumbnail: whether a thumbnail follows the tiles of a grid.
    """

    size: int
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool

    def grid(self, width: int, height: int, max_tiles: int | None = None) -> tuple[int, int]:
        """Return the numbers of columns and rows for an image of that size. ``max_tiles`` replaces the checkpoint's."""
        aspect, area = width / height, width * height
        best, closest = (1, 1), float("inf")
        for columns, rows in self._grids(max_tiles or self.max_tiles):
            distance = abs(aspect - columns / rows)
            # The larger of two equally close grids wins where the image has over half as many pixels as its tiles.
            is_large = area > 0.5 * self.size * self.size * columns * rows
            if distance < closest or (distance == closest and is_large):
                best, closest = (columns, rows), distance
        return best

    def tiles(self, image: Image.Image, max_tiles: int | None = None) -> npt.NDArray[np.float32]:
        """Return the tiles of an RGB image row by row, then the thumbnail: [tiles, 3, size, size]."""
        size = self.size
        columns, rows = self.grid(image.width, image.height, max_tiles)
        canvas = _resized(image, columns * size, rows * size)
        pixels = [
            canvas[row * size : (row + 1) * size, column * size : (column + 1) * size]
            for row in range(rows)
            for column in range(columns)
        ]
        if self.use_thumbnail and len(pixels) > 1:
            pixels.append(_resized(image, size, size))
        return np.stack([_normalized(tile) for tile in pixels])

    def _grids(self, max_tiles: int) -> list[tuple[int, int]]:
        """Return (columns, rows) of every grid that is allowed, those with fewer tiles first."""
        least = min(self.min_tiles, max_tiles)
        sides = range(1, max_tiles + 1)
        grids = [
            (columns, rows) for columns in sides for rows in sides if least <= columns * rows <= max_tiles
        ]
        return sorted(grids, key=lambda grid: grid[0] * grid[1])


def _resized(image: Image.Image, width: int, height: int) -> npt.NDArray[np.uint8]:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _normalized(tile: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return [height, width, 3] as normalized float32 [3, height, width]."""
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    return np.stack(
        [
            ((levels - np.float32(mean)) / np.float32(std))[tile[..., channel]]
            for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True))
        ]
    )
