"""Tiles of InternVL's original checkpoints: grids worked out by hand, and pixels beside transformers' tiles."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from logitengine.images.tiling import MEAN, STD, Tiling
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

TWELVE = Tiling(size=448, min_tiles=1, max_tiles=12, use_thumbnail=True)

# With 12 tiles of 448 pixels the aspect ratios of grids are 1, 4/3, 3/2, 2, 5/2, 3, 4 ... 12 and their inverses. Grids of
# one aspect ratio: the larger wins above 100,352 pixels a tile of it. 2 x 2: 401,408; 3 x 3: 903,168; 4 x 2: 802,816;
# 6 x 2: 1,204,224.
GRIDS = {
    # square: by area
    (1, 1): (1, 1),
    (448, 448): (1, 1),
    (633, 633): (1, 1),  # 400,689
    (634, 634): (2, 2),  # 401,956
    (896, 896): (2, 2),
    (950, 950): (2, 2),  # 902,500
    (951, 951): (3, 3),  # 904,401
    (4000, 4000): (3, 3),
    (2000, 2001): (3, 3),
    (1000, 900): (2, 2),  # 1.11, and 900,000
    (1100, 1000): (3, 3),  # 1.1 is closer to 1 than to 4/3
    # an aspect ratio that a grid has
    (800, 600): (4, 3),
    (640, 480): (4, 3),
    (480, 640): (3, 4),
    (1500, 1000): (3, 2),
    (1000, 1500): (2, 3),
    (1250, 500): (5, 2),
    (500, 1250): (2, 5),
    (1000, 500): (2, 1),
    (1266, 633): (2, 1),  # 801,378
    (1270, 635): (4, 2),  # 806,450
    (1500, 500): (3, 1),  # 750,000
    (500, 1500): (1, 3),
    (3000, 1000): (6, 2),
    (1000, 3000): (2, 6),
    (700, 100): (7, 1),
    (100, 700): (1, 7),
    (100, 1100): (1, 11),
    (1200, 100): (12, 1),
    # the closest
    (1920, 1080): (4, 2),  # 1.78: 2 is 0.22 away and 3/2 is 0.28
    (1080, 1920): (2, 4),  # 0.5625: 1/2 is 0.06 away and 2/3 is 0.10
    (1280, 720): (4, 2),  # 921,600
    (640, 360): (2, 1),  # 230,400
    (625, 1000): (2, 3),
    (375, 1000): (2, 5),
    (5000, 400): (12, 1),
    (400, 5000): (1, 12),
    (200, 1): (12, 1),
    # halfway between two aspect ratios: the same rule of area, grid after grid from the smallest
    (2250, 1000): (5, 2),  # 2 and 5/2: 2 x 1, then 4 x 2, then 5 x 2
    (900, 400): (2, 1),  # 360,000
    (3500, 1000): (6, 2),  # 3 and 4: 3 x 1, then 4 x 1, then 6 x 2
    (1400, 400): (4, 1),  # 560,000
    (700, 200): (3, 1),  # 140,000
    (1750, 1000): (4, 2),  # 3/2 and 2: 2 x 1, then 3 x 2, then 4 x 2
    (1050, 600): (3, 2),  # 630,000
    (875, 500): (2, 1),  # 437,500
    (4500, 1000): (5, 1),
    (450, 100): (4, 1),
}
"""Width and height: columns and rows."""


@pytest.mark.parametrize(("size", "grid"), GRIDS.items())
def test_an_image_gets_the_grid_that_is_closest_to_it(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert TWELVE.grid(*size) == grid


@pytest.mark.parametrize(
    ("size", "least", "most", "grid"),
    [
        ((1920, 1080), 1, 4, (2, 1)),
        ((1920, 1080), 1, 1, (1, 1)),
        ((1000, 800), 1, 6, (3, 2)),  # halfway between 1 and 3/2: 1 x 1, 2 x 2, 3 x 2
        ((800, 600), 1, 6, (3, 2)),  # without 4 x 3, 3/2 is closest to 4/3
        ((600, 800), 1, 6, (2, 3)),
        ((448, 448), 2, 6, (2, 2)),
        ((448, 448), 5, 6, (2, 3)),  # 2/3 is closer to 1 than 3/2
        ((9000, 100), 1, 40, (40, 1)),
    ],
)
def test_least_and_most_tiles_bound_the_grid(
    size: tuple[int, int], least: int, most: int, grid: tuple[int, int]
) -> None:
    tiling = Tiling(size=448, min_tiles=least, max_tiles=most, use_thumbnail=False)
    assert tiling.grid(*size) == grid


@pytest.mark.parametrize(("most", "grid"), [(1, (1, 1)), (4, (2, 1)), (12, (4, 2)), (None, (2, 1))])
def test_a_request_may_ask_for_fewer_or_more_tiles(most: int | None, grid: tuple[int, int]) -> None:
    assert Tiling(size=448, min_tiles=1, max_tiles=6, use_thumbnail=True).grid(1920, 1080, most) == grid


def test_every_grid_is_a_closest_one_in_exact_arithmetic() -> None:
    generator = np.random.default_rng(3)
    for width, height in generator.integers(1, 3000, (300, 2)).tolist():
        columns, rows = TWELVE.grid(width, height)
        aspect = Fraction(width, height)
        distances = [abs(aspect - Fraction(i, j)) for i in range(1, 13) for j in range(1, 13) if i * j <= 12]
        assert abs(aspect - Fraction(columns, rows)) - min(distances) < Fraction(1, 10**12), (width, height)


def picture(width: int, height: int) -> Image.Image:
    """Return a picture of soft shapes and noise."""
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    soft = np.stack([np.sin(9 * across), np.cos(7 * down), across * down], axis=-1) * 110 + 128
    noise = np.random.default_rng(width + height).normal(0, 20, soft.shape)
    return Image.fromarray((soft + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    "size", [(1, 1), (3, 7), (448, 448), (641, 479), (1000, 333), (333, 1000), (1300, 1290)]
)
@pytest.mark.parametrize("side", [56, 448])
def test_pixels_are_those_of_transformers_tiles(size: tuple[int, int], side: int) -> None:
    """transformers scales by 1/255 in another order: values below 2.7 within 5e-7, two units in the last place."""
    image = picture(*size)
    tiles = Tiling(size=side, min_tiles=1, max_tiles=12, use_thumbnail=True).tiles(image)
    reference = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side}, image_mean=list(MEAN), image_std=list(STD), crop_to_patches=True
    )(image, return_tensors="np")["pixel_values"]
    assert tiles.dtype == np.float32
    assert tiles.shape == reference.shape
    np.testing.assert_allclose(tiles, reference, rtol=0, atol=5e-7)


def test_tiles_are_cut_row_by_row_and_the_thumbnail_is_last() -> None:
    image = Image.new("RGB", (200, 100))
    image.paste("#ffffff", (100, 0, 200, 50))  # the third and the fourth of 4 x 2
    tiling = Tiling(size=10, min_tiles=1, max_tiles=12, use_thumbnail=True)
    assert tiling.grid(200, 100) == (4, 2)
    tiles = tiling.tiles(image)
    assert tiles.shape == (9, 3, 10, 10)
    centres = tiles[:, 0, 5, 5] > 0
    assert centres[:8].tolist() == [False, False, True, True, False, False, False, False]
    assert tiles[8, 0, 2, 7] > 0 > tiles[8, 0, 7, 7]


def test_one_tile_has_no_thumbnail_and_many_have_none_where_the_checkpoint_says_so() -> None:
    assert TWELVE.tiles(picture(100, 100)).shape == (1, 3, 448, 448)
    plain = Tiling(size=32, min_tiles=1, max_tiles=12, use_thumbnail=False)
    assert plain.tiles(picture(400, 300)).shape == (12, 3, 32, 32)


def test_black_and_white_are_normalized_by_imagenets_mean_and_deviation() -> None:
    for colour, level in (("#000000", 0.0), ("#ffffff", 1.0)):
        tile = TWELVE.tiles(Image.new("RGB", (448, 448), colour))[0]
        expected = [(level - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
        np.testing.assert_allclose(tile[:, 0, 0], expected, rtol=1e-6)
        assert (tile == tile[:, :1, :1]).all()
