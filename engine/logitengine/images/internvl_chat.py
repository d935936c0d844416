"""Images of InternVL's original checkpoints, by what their config.json says."""

from __future__ import annotations

from typing import Any

from PIL import Image

from logitengine.images.items import item_of
from logitengine.images.messages import Detail, PreparedItem
from logitengine.images.model_files import ImageModelError, ModelFiles
from logitengine.images.tiling import Tiling

MOST_TILES = 256

DETAIL_TILES = {"auto": None, "low": 1, "high": 12, "original": 12}
"""Most tiles of a grid by ``detail``; None: as many as the checkpoint says. The thumbnail comes on top."""


class InternVLChatProcessor:
    """Prepares images as InternVL's own example does, which the checkpoints bring no processor for.

    Defaults are those of the checkpoints' own configuration class. Raises ImageModelError.
    """

    def __init__(self, files: ModelFiles) -> None:
        config = files.config
        if config.get("pad2square"):
            raise ImageModelError("config.json's pad2square is not supported")
        size = int(files.number("force_image_size", files.vision.get("image_size", 224)))
        patch, shrink = int(files.vision.get("patch_size", 14)), files.number("downsample_ratio", 0.5)
        self._num_tokens = int((size // patch) ** 2 * shrink**2)
        self._is_dynamic = bool(config.get("dynamic_image_size", False))
        self._tiling = Tiling(
            size=size,
            min_tiles=_num_tiles(config, "min_dynamic_patch", 1),
            max_tiles=_num_tiles(config, "max_dynamic_patch", 6),
            use_thumbnail=bool(config.get("use_thumbnail", False)),
        )

    def prepare(self, image: Image.Image, detail: Detail) -> tuple[list[PreparedItem], list[str | int]]:
        """Return the items of an RGB image, its tiles, and their layout."""
        tiles = self._tiling.tiles(image, DETAIL_TILES[detail] if self._is_dynamic else 1)
        items = [item_of(tile, self._num_tokens) for tile in tiles]
        return items, ["<img>", *range(len(items)), "</img>"]


def _num_tiles(config: dict[str, Any], name: str, default: int) -> int:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_TILES:
        raise ImageModelError(f"config.json's {name} is {value!r}, not a number from 1 to {MOST_TILES}")
    return value
