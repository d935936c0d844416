"""From a decoded image to items and a layout, as each family of models wants it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from logitengine.images.decoding import RefusedImageError
from logitengine.images.internvl_chat import InternVLChatProcessor
from logitengine.images.items import item_of
from logitengine.images.messages import Detail, PreparedItem
from logitengine.images.model_files import ImageModelError, ModelFiles
from logitengine.logs import join_loggers

Prepared = tuple[list[PreparedItem], list[str | int]]
"""Items, and the layout that names them."""

TRIAL_SIZES = ((160, 96), (90, 210))
"""Widths and heights of the images that show whether a processor works."""


class ImageProcessor(Protocol):
    """Prepares images for one model."""

    def prepare(self, image: Image.Image, detail: Detail) -> Prepared:
        """Return the items of an RGB image and their layout. Raises RefusedImageError."""


def load_processor(directory: Path, max_tokens: int) -> ImageProcessor:
    """Return the processor of the model in ``directory``, after a trial.

    Models that read any resolution get at most ``max_tokens`` tokens of an image. Raises ImageModelError.
    """
    files = ModelFiles(directory)
    family = str(files.config.get("model_type"))
    processor: ImageProcessor
    if family == "internvl_chat":
        processor = InternVLChatProcessor(files)
    elif family in FAMILIES:
        processor = TransformersProcessor(files, FAMILIES[family], max_tokens)
    else:
        known = ", ".join(sorted({*FAMILIES, "internvl_chat"}))
        raise ImageModelError(
            f"images for the model type {family!r} are not supported; supported are {known}"
        )
    _try_out(processor)
    return processor


def _try_out(processor: ImageProcessor) -> None:
    """Raise ImageModelError for a processor that fails, or whose items an encoder of one shape cannot read."""
    try:
        prepared = [processor.prepare(Image.new("RGB", size), "auto") for size in TRIAL_SIZES]
    except RefusedImageError as error:
        raise ImageModelError(
            f"the model's image processor does not work: {error.__cause__ or error}"
        ) from error
    shapes = {item.pixels.shape for items, _ in prepared for item in items if item.grid is None}
    if len(shapes) > 1:
        raise ImageModelError(
            "the model's image processor makes images of several sizes, which is not supported"
        )


class TransformersProcessor:
    """One of transformers' image processors, on Pillow, with the layout of its family."""

    def __init__(self, files: ModelFiles, family: Callable[[ModelFiles], Family], max_tokens: int) -> None:
        from transformers import AutoConfig, AutoImageProcessor  # imports torch

        join_loggers()
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(str(files.directory), **options)
            self._processor = AutoImageProcessor.from_pretrained(
                str(files.directory), backend="pil", **options
            )
        except Exception as error:
            raise ImageModelError(f"the model's image processor cannot be loaded: {error}") from error
        if getattr(self._processor, "backend", None) != "pil":
            raise ImageModelError(f"the image processor {type(self._processor).__name__} needs torchvision")
        self._family = family(ModelFiles(files.directory, config.to_dict()))
        if isinstance(self._family, _QwenVL):
            self._family.bound(self._processor, max_tokens)

    def prepare(self, image: Image.Image, detail: Detail) -> Prepared:
        options = self._family.options(detail)
        try:
            outputs = self._processor(image, return_tensors="np", **options)
            return self._family.prepared(outputs)
        except (MemoryError, RefusedImageError):
            raise
        except Exception as error:
            size = f"{image.width:,} x {image.height:,}"
            raise RefusedImageError(
                f"has a size, {size}, that the model's image processor refuses"
            ) from error


class Family(Protocol):
    """What a family's processor class does around its image processor."""

    def options(self, detail: Detail) -> dict[str, Any]:
        """Return the options of the image processor's call."""

    def prepared(self, outputs: Any) -> Prepared:
        """Return the items of the image processor's outputs, arrays by name, and their layout."""


class _InternVL:
    """Tiles between two tokens. With detail "low" there is one tile, else as many as the processor chooses."""

    def __init__(self, files: ModelFiles) -> None:
        self._patch = files.patch_sides()
        self._shrink = files.number("downsample_ratio", 0.5)
        self._begin = files.special_token("start_image_token", "<img>")
        self._end = files.special_token("end_image_token", "</img>")

    def options(self, detail: Detail) -> dict[str, Any]:
        return {"crop_to_patches": detail != "low"}

    def prepared(self, outputs: Any) -> Prepared:
        tiles = outputs["pixel_values"]
        num_tokens = int(_num_patches(tiles, self._patch) * self._shrink**2)
        items = [item_of(tile, num_tokens) for tile in tiles]
        return items, [self._begin, *range(len(items)), self._end]


class _Llava:
    """The image, without a token around it. ``detail`` changes nothing."""

    def __init__(self, files: ModelFiles) -> None:
        self._patch = files.patch_sides()
        has_class = files.vision.get("model_type", "clip_vision_model") == "clip_vision_model"
        self._num_more = int(files.processor.get("num_additional_image_tokens", has_class))
        strategy = files.config.get("vision_feature_select_strategy", "default")
        if strategy not in {"default", "full"}:
            raise ImageModelError(f"config.json's vision_feature_select_strategy {strategy!r} is unknown")
        self._num_more -= strategy == "default"  # which drops the first

    def options(self, detail: Detail) -> dict[str, Any]:  # noqa: ARG002 - there is one way
        return {}

    def prepared(self, outputs: Any) -> Prepared:
        pixels = outputs["pixel_values"]
        num_tokens = _num_patches(pixels, self._patch) + self._num_more
        return [item_of(pixels[0], num_tokens)], [0]


class _Idefics3:
    """Tiles in rows and columns and the whole image, each after its name. With detail "low" only the whole image."""

    def __init__(self, files: ModelFiles) -> None:
        self._patch = files.patch_sides()
        self._shrink = files.number("scale_factor", 2)
        self._fake = files.special_token("fake_image_token", "<fake_token_around_image>")
        self._whole = files.special_token("global_image_token", "<global-img>")

    def options(self, detail: Detail) -> dict[str, Any]:
        return {"return_row_col_info": True} | ({"do_image_splitting": False} if detail == "low" else {})

    def prepared(self, outputs: Any) -> Prepared:
        (tiles,) = outputs["pixel_values"]
        mask = outputs.get("pixel_attention_mask")
        if mask is not None and not np.all(mask):
            raise RefusedImageError("comes out in tiles of several sizes")
        num_tokens = int(_num_patches(tiles, self._patch) / self._shrink**2)
        rows, columns = np.asarray(outputs["rows"]).item(), np.asarray(outputs["cols"]).item()
        layout: list[str | int] = []
        text = ""
        for row in range(rows):
            for column in range(columns):
                layout += [f"{text}{self._fake}<row_{row + 1}_col_{column + 1}>", row * columns + column]
                text = ""
            text = "\n"
        if rows:
            text += "\n"
        layout += [f"{text}{self._fake}{self._whole}", len(tiles) - 1, self._fake]
        return [item_of(tile, num_tokens) for tile in tiles], layout


class _Gemma3:
    """The image in a paragraph of its own. ``detail`` changes nothing."""

    def __init__(self, files: ModelFiles) -> None:
        if files.image_processor.get("do_pan_and_scan"):
            raise ImageModelError("the image processor's do_pan_and_scan is not supported")
        self._num_tokens = int(files.number("mm_tokens_per_image", 256))
        self._begin = files.special_token("boi_token", "<start_of_image>")
        self._end = files.special_token("eoi_token", "<end_of_image>")

    def options(self, detail: Detail) -> dict[str, Any]:  # noqa: ARG002 - there is one way
        return {"do_pan_and_scan": False, "do_convert_rgb": True}

    def prepared(self, outputs: Any) -> Prepared:
        (pixels,) = outputs["pixel_values"]
        return [item_of(pixels, self._num_tokens)], [f"\n\n{self._begin}", 0, f"{self._end}\n\n"]


class _QwenVL:
    """The image in patches of a grid; its chat template writes the tokens around it. ``detail`` changes nothing.

    An image with more patches than the checkpoint, or the bound on its tokens, allows is made smaller.
    """

    def __init__(self, files: ModelFiles) -> None:
        self._merge = int(
            files.image_processor.get("merge_size") or files.vision.get("spatial_merge_size", 2)
        )

    def options(self, detail: Detail) -> dict[str, Any]:  # noqa: ARG002 - there is one way
        return {}

    def bound(self, processor: Any, max_tokens: int) -> None:
        """Have the image processor make no more than ``max_tokens`` tokens of an image."""
        size = processor.size
        most = max_tokens * (self._merge * processor.patch_size) ** 2
        processor.size = dataclasses.replace(
            size, shortest_edge=min(size.shortest_edge, most), longest_edge=min(size.longest_edge, most)
        )

    def prepared(self, outputs: Any) -> Prepared:
        (grid,) = outputs["image_grid_thw"].tolist()
        num_tokens = grid[0] * grid[1] * grid[2] // self._merge**2
        return [item_of(outputs["pixel_values"], num_tokens, tuple(grid))], [0]


FAMILIES: dict[str, Callable[[ModelFiles], Family]] = {
    "internvl": _InternVL,
    "llava": _Llava,
    "idefics3": _Idefics3,
    "smolvlm": _Idefics3,
    "gemma3": _Gemma3,
    "qwen2_vl": _QwenVL,
    "qwen2_5_vl": _QwenVL,
    "qwen3_vl": _QwenVL,
}
"""By config.json's ``model_type``."""


def _num_patches(pixels: npt.NDArray[Any], patch: tuple[int, int]) -> int:
    """Return the number of patches of each image in [images, channels, height, width]."""
    height, width = pixels.shape[-2:]
    return int(height // patch[0]) * int(width // patch[1])
