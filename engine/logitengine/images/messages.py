"""Messages between the server and the process that prepares images. Free of torch, transformers and Pillow."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from logitengine.link.messages import Array

Detail = Literal["auto", "low", "high", "original"]
"""OpenAI's word for how many tiles an image may have; auto: as many as the checkpoint says."""


class PrepareImage(Struct, frozen=True, tag=True):
    """Prepare an image. ``data`` uint8 [bytes] is its file. Answered by PreparedImage or RefusedImage of the same number."""

    number: int
    data: Array
    detail: Detail = "auto"


class PreparedItem(Struct, frozen=True, kw_only=True, array_like=True):
    """One input of the model's encoder; ``pixels``, ``digest`` and ``grid`` are those of `link.messages.PromptItem`.

    ``num_tokens`` is the number of placeholder tokens that it takes.
    """

    pixels: Array
    digest: bytes
    num_tokens: int
    grid: tuple[int, int, int] | None = None


class PreparedImage(Struct, frozen=True, tag=True, array_like=True):
    """A prepared image.

    ``layout`` replaces the image's mark in the prompt's text: texts, which may spell added tokens, and indices of
    ``items``, each of which stands for that item's placeholder tokens.
    """

    number: int
    items: list[PreparedItem]
    layout: list[str | int]


class RefusedImage(Struct, frozen=True, tag=True, array_like=True):
    """An image that cannot be served. ``message`` is for the client and names no file, address or library."""

    number: int
    message: str


class ImagesReady(Struct, frozen=True, tag=True, array_like=True):
    """The process can prepare images."""


class ImagesFailed(Struct, frozen=True, tag=True, array_like=True):
    """The process cannot prepare this model's images, and exits."""

    message: str


ToImages = PrepareImage
FromImages = PreparedImage | RefusedImage | ImagesReady | ImagesFailed
