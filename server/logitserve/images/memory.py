"""The budget of images: bytes that unfinished requests hold, from their files to what the model's encoder reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from logitserve.errors import RETRY_AFTER_SECONDS, ApiError, BadRequestError


class HeldImages:
    """Bytes that one request holds. They are given back when it is over."""

    def __init__(self, memory: ImageMemory) -> None:
        self._memory = memory
        self.nbytes = 0

    def hold(self, nbytes: int) -> None:
        """Count ``nbytes`` more.

        Raises BadRequestError where the budget is too small for this request alone, and ApiError 429 where others hold
        too much of it.
        """
        self._memory.take(nbytes, self.nbytes + nbytes)
        self.nbytes += nbytes

    def give_back(self, nbytes: int) -> None:
        """Count ``nbytes`` less."""
        self._memory.nbytes -= nbytes
        self.nbytes -= nbytes


class ImageMemory:
    """Counts the bytes of all requests.

    Attributes:
        nbytes: bytes that are held at the moment.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.nbytes = 0

    @contextlib.contextmanager
    def holding(self) -> Iterator[HeldImages]:
        """Yield the account of one request, which ends with the block."""
        held = HeldImages(self)
        try:
            yield held
        finally:
            held.give_back(held.nbytes)

    def take(self, nbytes: int, of_request: int) -> None:
        """Count ``nbytes`` of a request that holds ``of_request`` with them. Raises ApiError where there is no room."""
        if of_request > self._limit:
            raise BadRequestError(
                f"'messages' has images that take up {of_request} bytes and more as the model reads them; this server holds "
                f"{self._limit} of all requests (--image-memory). Send fewer or smaller ones, or a lower 'detail'.",
                param="messages",
                code="images_too_large",
            )
        if self.nbytes + nbytes > self._limit:
            raise ApiError(
                429,
                f"The images of other requests take up --image-memory, {self._limit} bytes; try again.",
                code="too_many_image_bytes",
                headers={"Retry-After": RETRY_AFTER_SECONDS},
            )
        self.nbytes += nbytes
