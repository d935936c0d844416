"""Decoding of image files that clients sent. Their bytes are hostile until they are pixels."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are read, by Pillow's names. No other parser of Pillow's sees a byte."""

READABLE = "PNG, JPEG, WebP, GIF, BMP and TIFF are"

MOST_PIXELS = 178_956_970
"""Pixels above which Pillow itself refuses a file, whatever its user allows."""

LONGEST_SIDE = 65_535
"""Pixels of a side; what a JPEG can have."""

STEEPEST_ASPECT = 200
"""Longest ratio of the sides. Qwen-VL's image processors refuse what is longer, and to others it is a line of noise."""

COLOUR_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
DEEP_GREY_MODES = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})


class RefusedImageError(Exception):
    """The image cannot be served. The message is a predicate without an end: "is damaged or ends early"."""


def decode(data: bytes | bytearray | memoryview, max_pixels: int) -> Image.Image:
    """Return the image in RGB, turned as its EXIF orientation says. Raises RefusedImageError.

    Transparency is dropped, as transformers' ``load_image`` and InternVL's own example do it. Of an animation or a file
    of several pages it is the first picture.

    Args:
        max_pixels: most pixels, looked up in the header before anything is decoded.
    """
    limit = min(max_pixels, MOST_PIXELS)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of large images, which are counted here, and of metadata out of order
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(image, limit)
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
        except Image.DecompressionBombError:
            raise RefusedImageError(_too_many(limit)) from None
        except UnidentifiedImageError:
            raise RefusedImageError(f"is not an image of a supported format ({READABLE})") from None
        except (RefusedImageError, MemoryError):
            raise
        except Exception:  # noqa: BLE001 - parsers of damaged files raise all there is
            raise RefusedImageError("is damaged or ends early") from None


def _check_size(image: Image.Image, limit: int) -> None:
    shorter, longer = sorted(image.size)
    if shorter < 1:
        raise RefusedImageError("has no pixels")
    if shorter * longer > limit:
        raise RefusedImageError(_too_many(limit))
    if longer > LONGEST_SIDE:
        raise RefusedImageError(f"has a side of {longer:,} pixels; at most {LONGEST_SIDE:,} are served")
    if longer > STEEPEST_ASPECT * shorter:
        raise RefusedImageError(
            f"has {image.width:,} x {image.height:,} pixels; a side may be at most {STEEPEST_ASPECT} times the other"
        )


def _too_many(limit: int) -> str:
    return f"has more than {limit:,} pixels (--max-image-pixels)"


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in DEEP_GREY_MODES:
        # Pillow's own conversion clips all that is no near black to white. It reads deep colours by their upper bytes.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode not in COLOUR_MODES:
        raise RefusedImageError(
            "has pixels that are no colours (32-bit numbers, or a colour space for print)"
        )
    return image.convert("RGB")
