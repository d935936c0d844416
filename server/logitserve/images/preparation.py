"""From the images of a request to what the model's encoder reads, within the budget of all requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from logitengine.images.messages import Detail, PreparedImage

from logitserve.images.memory import HeldImages
from logitserve.images.sources import ImageSources
from logitserve.protocol.chat import SentImage


class Preparer(Protocol):
    """Decodes images and prepares them for one model, off the event loop."""

    async def start(self) -> None:
        """Get ready. Raises an exception where the model's images cannot be prepared."""

    async def prepare(self, data: bytes, detail: Detail, *, param: str) -> PreparedImage:
        """Return the image of a file. Raises ApiError, naming ``param`` where the file is at fault."""
        ...

    async def close(self) -> None:
        """End whatever was started."""


async def prepare_images(
    images: Sequence[SentImage], sources: ImageSources, preparer: Preparer, held: HeldImages
) -> list[PreparedImage]:
    """Read and prepare a request's images one after the other. ``held`` then counts what they take up.

    Raises ApiError.
    """
    prepared = []
    num_url_bytes = sum(len(image.url) for image in images)
    held.hold(num_url_bytes)
    for image in images:
        data = await sources.read(image.url, image.param, held.hold)
        result = await preparer.prepare(data, image.detail, param=image.param)
        held.give_back(len(data))
        held.hold(sum(item.pixels.nbytes for item in result.items))
        prepared.append(result)
    held.give_back(num_url_bytes)
    return prepared
