"""Compressed request bodies."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logitserve.config import ServerConfig
from logitserve.errors import ApiError, BadRequestError
from logitserve.http.refusal import refuse

GZIP = frozenset({b"gzip", b"x-gzip"})
GZIP_WINDOW = 31
"""zlib's number for a gzip header and a window of any size."""

PIECE_BYTES = 256 << 10
"""Largest piece that is inflated before the event loop turns: less than a millisecond's work."""

INPUT_BYTES = 16 << 10
"""Compressed bytes given to zlib at once. Each end of a member copies the rest of them."""


class ContentEncoding:
    """Decodes gzip bodies piece by piece. Other encodings are refused with 415, and more than ``max_body_bytes`` with 413."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._limit = config.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        coding = _coding(scope)
        if coding in {b"", b"identity"}:
            await self._app(scope, receive, send)
        elif coding in GZIP:
            # The length and the encoding are those of the compressed body.
            headers = [
                header
                for header in scope["headers"]
                if header[0] not in {b"content-encoding", b"content-length"}
            ]
            body = _DecodedBody(receive, self._limit)
            await self._app({**scope, "headers": headers}, body.receive, send)
        else:
            name = coding.decode("latin-1")[:100]
            message = f"Content-Encoding '{name}' is not supported: send gzip, x-gzip, identity or none."
            await refuse(ApiError(415, message, headers={"Accept-Encoding": "gzip"}), scope, receive, send)


def _coding(scope: Scope) -> bytes:
    """Return the encoding of an HTTP request's body, lower case; several are joined by commas."""
    if scope["type"] != "http":
        return b""
    return b", ".join(
        value.strip().lower() for name, value in scope["headers"] if name == b"content-encoding"
    )


class _DecodedBody:
    """The messages of a gzip body, inflated. One message of the client becomes several."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._num_inflated = 0
        self._inflater = zlib.decompressobj(GZIP_WINDOW)
        self._has_begun = False
        self._more_body = True
        self._has_ended = False
        self._pieces: Iterator[bytes] = iter(())

    async def receive(self) -> Message:
        """Return the next piece.

        Raises ApiError 400 for a body that is not gzip, and 413 for a body that is too long.
        """
        while True:
            for piece in self._pieces:
                await asyncio.sleep(0)
                if piece:
                    return {"type": "http.request", "body": piece, "more_body": True}
            if not self._more_body and not self._has_ended:
                return self._end()
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._more_body = message.get("more_body", False)
            self._pieces = self._inflate(message.get("body", b""))

    def _end(self) -> Message:
        if not self._has_begun or not self._inflater.eof:
            raise _not_gzip("it ends too early")
        self._has_ended = True
        return {"type": "http.request", "body": b"", "more_body": False}

    def _inflate(self, compressed: bytes) -> Iterator[bytes]:
        """Yield ``compressed`` inflated, in pieces that may be empty."""
        for start in range(0, len(compressed), INPUT_BYTES):
            waiting = compressed[start : start + INPUT_BYTES]
            is_done = False
            while not is_done:
                if self._inflater.eof:  # another member follows
                    self._inflater = zlib.decompressobj(GZIP_WINDOW)
                piece = self._inflate_piece(waiting)
                waiting = self._inflater.unused_data or self._inflater.unconsumed_tail
                # zlib may hold back more of a full piece, whose input it has taken.
                is_done = not waiting and (self._inflater.eof or len(piece) < PIECE_BYTES)
                yield piece

    def _inflate_piece(self, compressed: bytes) -> bytes:
        self._has_begun = True
        try:
            piece = self._inflater.decompress(compressed, PIECE_BYTES)
        except zlib.error:
            raise _not_gzip("its data is corrupt, or something else follows it") from None
        self._num_inflated += len(piece)
        if self._num_inflated > self._limit:
            message = f"The body is larger than {self._limit} bytes when decoded (--max-body-bytes)."
            raise ApiError(413, message)
        return piece


def _not_gzip(why: str) -> BadRequestError:
    return BadRequestError(f"The body is not valid gzip: {why}.", code="invalid_content_encoding")
