"""Checks of the items of a request's prompt against the model's image encoder."""

from __future__ import annotations

from math import prod

from logitengine.errors import RequestRefusedError
from logitengine.link.messages import EncoderInfo, GenerationRequest, ModelInfo, PromptItem


def output_nbytes_per_token(info: ModelInfo) -> int:
    """Return the bytes of the encoder's output for a placeholder token; 0 without an encoder."""
    encoder = info.encoder
    return 0 if encoder is None else (1 + encoder.depth) * info.hidden_size * 4


def check_items(request: GenerationRequest, info: ModelInfo, cache_bytes: int) -> None:
    """Check that the encoder can read the items and that ``cache_bytes`` hold the output of each.

    Raises RequestRefusedError.
    """
    encoder, end = info.encoder, 0
    for number, item in enumerate(request.items):
        if encoder is None:
            raise RequestRefusedError(f"{info.architecture} reads no images")
        if not end <= item.start < item.stop <= len(request.prompt_token_ids):
            raise RequestRefusedError(f"item {number} stands at {item.start}:{item.stop}, where it cannot")
        end = item.stop
        if encoder.joins_tokens and end == len(request.prompt_token_ids):
            raise RequestRefusedError("the prompt ends with an image, which this model expects text after")
        _check_pixels(number, item, encoder)
        nbytes = (item.stop - item.start) * output_nbytes_per_token(info)
        if nbytes > cache_bytes:
            raise RequestRefusedError(
                f"the output of item {number} takes {nbytes} bytes, and {cache_bytes} may be kept (--image-cache-bytes)"
            )


def _check_pixels(number: int, item: PromptItem, encoder: EncoderInfo) -> None:
    shape, num_tokens = encoder.pixels_shape, encoder.num_tokens
    if (item.grid is not None) != (encoder.num_tokens == 0):
        raise RequestRefusedError(
            f"item {number} has a grid of patches where the encoder has none, or lacks it"
        )
    if item.grid is not None:
        time, height, width = item.grid
        if time != 1 or min(height, width) < 1 or height % encoder.merge_size or width % encoder.merge_size:
            raise RequestRefusedError(
                f"item {number} has {item.grid} patches; one in time and multiples of {encoder.merge_size} are read"
            )
        shape, num_tokens = (height * width, *shape), height * width // encoder.merge_size**2
    if num_tokens > encoder.max_tokens:
        raise RequestRefusedError(
            f"item {number} has {num_tokens} tokens; an image may have {encoder.max_tokens} (--max-image-tokens)"
        )
    pixels = item.pixels
    if pixels.dtype != "float32" or tuple(pixels.shape) != shape or pixels.nbytes != 4 * prod(shape):
        raise RequestRefusedError(
            f"the pixels of item {number} are {pixels.dtype} {pixels.shape}; {shape} are read"
        )
    if item.stop - item.start != num_tokens:
        raise RequestRefusedError(
            f"item {number} has {item.stop - item.start} placeholder tokens; its output has {num_tokens}"
        )
