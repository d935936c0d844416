"""The budget of request bodies: bytes of all requests together that have come and are not parsed yet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from logitserve.errors import RETRY_AFTER_SECONDS, ApiError


class HeldBodies:
    """Counts the bytes of bodies that are being read.

    A parsed body is bounded by its place in the RequestQueue.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.nbytes = 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that counts a body's next bytes until the block ends.

        The function raises ApiError 429 when there is no room.
        """
        held = 0

        def hold(nbytes: int) -> None:
            nonlocal held
            if self.nbytes + nbytes > self._limit:
                raise ApiError(
                    429,
                    f"The bodies of requests that are being sent take up {self._limit} bytes (--max-total-body-bytes).",
                    code="too_many_body_bytes",
                    headers={"Retry-After": RETRY_AFTER_SECONDS},
                )
            self.nbytes += nbytes
            held += nbytes

        try:
            yield hold
        finally:
            self.nbytes -= held
