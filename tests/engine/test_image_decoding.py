"""Decoding of hostile and odd image files."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from logitengine.images.decoding import FORMATS, STEEPEST_ASPECT, RefusedImageError, decode
from PIL import Image, ImageFile

MAX_PIXELS = 50_000_000

LOSSLESS = ("PNG", "WEBP", "BMP", "TIFF")


def noise(width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    if kind == "WEBP":
        options.setdefault("lossless", True)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    image = decode(data, max_pixels)
    assert image.mode == "RGB"
    return image


def refusal(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(RefusedImageError) as caught:
        decode(data, max_pixels)
    message = str(caught.value)
    assert " at 0x" not in message
    assert "PIL" not in message
    return message


def png_of_header(width: int, height: int) -> bytes:
    """Return a PNG file that announces a size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 1000)), chunk(b"IEND", b"")]
    )


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_lossless_file_keeps_its_pixels(kind: str) -> None:
    image = noise()
    assert np.array_equal(np.asarray(decoded(file_of(image, kind))), np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "GIF"])
def test_a_lossy_file_is_read_as_pillow_reads_it(kind: str) -> None:
    data = file_of(noise(), kind)
    assert decoded(data).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no image at all",
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"%PDF-1.4\n",
        file_of(noise(), "PPM"),
        file_of(noise(), "ICO"),
        file_of(noise(), "JPEG2000"),
    ],
    ids=["empty", "text", "svg", "eps", "pdf", "ppm", "ico", "jpeg2000"],
)
def test_what_is_no_image_of_a_supported_format_is_refused(data: bytes) -> None:
    assert refusal(data) == "is not an image of a supported format (PNG, JPEG, WebP, GIF, BMP and TIFF are)"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_truncated_file_is_refused(kind: str, share: float) -> None:
    data = file_of(noise(300, 200), kind)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert refusal(data[: int(len(data) * share)])


def test_a_file_with_a_damaged_middle_is_refused_and_says_so() -> None:
    data = bytearray(file_of(noise(300, 200)))
    middle = len(data) // 2
    data[middle : middle + 500] = b"\0" * 500
    assert refusal(bytes(data)) == "is damaged or ends early"


@pytest.mark.parametrize("kind", FORMATS)
def test_random_damage_is_an_image_or_a_refusal(kind: str) -> None:
    generator = np.random.default_rng(11)
    whole = file_of(noise(64, 48), kind)
    for _ in range(150):
        data = bytearray(whole)
        for position in generator.integers(0, len(data), 6):
            data[position] = generator.integers(0, 256)
        with contextlib.suppress(RefusedImageError):
            decoded(bytes(data))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 2)])
def test_small_images_are_served(size: tuple[int, int]) -> None:
    assert decoded(file_of(noise(*size))).size == size


@pytest.mark.parametrize("size", [(40_000, 1), (1, 40_000), (201, 1), (3, 601)])
def test_a_long_strip_is_refused_with_its_bound(size: tuple[int, int]) -> None:
    message = refusal(file_of(noise(*size)))
    assert f"at most {STEEPEST_ASPECT} times the other" in message


@pytest.mark.parametrize(
    ("width", "height"), [(20_000, 10_000), (60_000, 60_000), (2_000_000_000, 2_000_000_000)]
)
def test_an_image_of_too_many_pixels_is_refused_by_its_header(width: int, height: int) -> None:
    assert refusal(png_of_header(width, height)) == "has more than 50,000,000 pixels (--max-image-pixels)"
    assert "has more than 178,956,970 pixels" in refusal(png_of_header(width, height), 1 << 40)


def test_the_bound_on_pixels_is_exact() -> None:
    data = file_of(noise(40, 30))
    assert decoded(data, 1200).size == (40, 30)
    assert refusal(data, 1199) == "has more than 1,199 pixels (--max-image-pixels)"


def test_a_bound_above_that_of_pillows_warning_raises_no_warning() -> None:
    assert Image.MAX_IMAGE_PIXELS == 89_478_485
    message = refusal(png_of_header(12_000, 10_000), 150_000_000)
    assert message == "is damaged or ends early"  # it went on to decode, and pytest makes errors of warnings


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_pictures_the_first_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    image = decoded(file_of(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert image.size == (20, 10)
    assert image.getpixel((5, 5)) == (255, 0, 0)


def test_a_palette_becomes_its_colours() -> None:
    image = noise(16, 16).quantize(200)
    assert decoded(file_of(image)).tobytes() == image.convert("RGB").tobytes()
    image.info["transparency"] = 3
    assert decoded(file_of(image)).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_and_transparent_modes_are_converted_as_pillow_does(mode: str, kind: str) -> None:
    data = file_of(noise().convert("RGBA").convert(mode), kind)
    assert decoded(data).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def test_transparent_pixels_keep_their_colour() -> None:
    assert decoded(file_of(Image.new("RGBA", (4, 4), (200, 100, 50, 0)))).getpixel((0, 0)) == (200, 100, 50)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    levels = np.array([[0, 255, 256, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    pixels = np.asarray(decoded(file_of(Image.fromarray(levels), kind)))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 0x12, 0x80, 0xFF]
    assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_that_are_no_colours_are_refused(mode: str) -> None:
    assert "no colours" in refusal(file_of(Image.new(mode, (8, 8), 70_000), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_converted(kind: str) -> None:
    pixel = decoded(file_of(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), kind)).getpixel((8, 8))
    assert isinstance(pixel, tuple)
    red, green, blue = pixel
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    # Red is at the top left of the upright picture. Below, where the stored picture has it.
    left, top = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[
        orientation
    ]
    stored = Image.new("RGB", (32, 48), "#0000ff")
    stored.paste("#ff0000", (left * 16, top * 24, left * 16 + 16, top * 24 + 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decoded(file_of(stored, kind, exif=exif))
    assert image.size == ((32, 48) if orientation <= 4 else (48, 32))
    pixel = image.getpixel((4, 4))
    assert isinstance(pixel, tuple)
    assert pixel[0] > 200
    far = image.getpixel((image.width - 5, image.height - 5))
    assert isinstance(far, tuple)
    assert far[0] < 50


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0" + b"\xff" * 60]
)
def test_broken_exif_data_turns_nothing(exif: bytes) -> None:
    image = noise(32, 48)
    assert decoded(file_of(image, "JPEG", exif=exif)).size == (32, 48)


def test_a_bomb_in_a_text_chunk_is_refused() -> None:
    bomb = zlib.compress(b"\0" * 200_000_000)
    content = b"Comment\0\0" + bomb
    chunk = (
        struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    )
    data = file_of(noise())
    assert refusal(data[:33] + chunk + data[33:]) == "is damaged or ends early"
