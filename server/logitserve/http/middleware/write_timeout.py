"""Clients that stop reading: their connection is closed, and their request ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logitserve.config import ServerConfig
from logitserve.http.connection import EXTENSION, Connection
from logitserve.http.scope import is_request
from logitserve.telemetry.record import names_of

logger = logging.getLogger(__name__)

SLICE_BYTES = 256 << 10
"""Longest piece of a body that is handed to uvicorn at once.

This process holds a piece twice for each slow client.
"""

CHECKS = 4
"""Checks of the progress per timeout. A client is dropped late by this share of the timeout at most."""


class WriteTimeout:
    """Drops clients that take nothing of their answer for ``write_timeout`` seconds, whatever kind of answer it is.

    Only time in which a message waits to be sent counts: a stream that has nothing to say may be silent for as long as it
    likes. Progress is what the client's machine acknowledges (Connection.num_untaken_bytes), so a client that reads slowly
    is never dropped, however long a slice takes it. For a WebSocket, and behind a server without that extension, progress
    is a message that has left.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._seconds = config.write_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_request(scope):
            await self._app(scope, receive, send)
            return
        connection: Connection | None = scope.get("extensions", {}).get(EXTENSION)
        try:
            # The timeout is never due by itself. The watch makes it so, and the request's work is then cancelled.
            async with asyncio.timeout(None) as end:
                watch = _Watch(send, connection, self._seconds, end)
                try:
                    await self._app(scope, receive, watch.send)
                finally:
                    watch.stop()
        except TimeoutError:
            if not end.expired():
                raise
            extra = {"path": scope["path"], "client": scope.get("client"), **names_of(scope)}
            logger.warning("a client took nothing for %g s and was dropped", self._seconds, extra=extra)


class _Watch:
    """Watches whether a response still makes progress on its way out.

    One timer serves all of a response's messages, since a timer for each would cost every token of a stream.
    """

    def __init__(
        self, send: Send, connection: Connection | None, seconds: float, end: asyncio.Timeout
    ) -> None:
        self._send = send
        self._connection = connection
        self._seconds = seconds
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._num_sent = 0
        self._is_sending = False
        self._progress = (0, 0)
        self._progress_at = self._loop.time()
        self._timer = self._loop.call_later(seconds / CHECKS, self._check)

    def stop(self) -> None:
        self._timer.cancel()

    async def send(self, message: Message) -> None:
        for part in _parts(message):
            if self._connection is not None and not part.get("more_body", True):
                # No timer would watch bytes that a response leaves in this process at its end. Earlier
                # messages do not wait for the kernel, since every token of a stream would.
                self._connection.limit_unsent(0)
            self._is_sending = True
            try:
                await self._send(part)
            finally:
                self._is_sending = False
            self._num_sent += 1

    def _check(self) -> None:
        now = self._loop.time()
        untaken = 0 if self._connection is None else self._connection.num_untaken_bytes()
        progress = (self._num_sent, untaken)
        if not self._is_sending or progress != self._progress:
            self._progress, self._progress_at = progress, now
        elif now - self._progress_at >= self._seconds:
            self._drop()
            return
        self._timer = self._loop.call_later(self._seconds / CHECKS, self._check)

    def _drop(self) -> None:
        # The connection is closed first, so that uvicorn knows of its loss when the request ends, and does
        # not complain.
        if self._connection is not None:
            self._connection.abort()
        self._end.reschedule(self._loop.time())


def _parts(message: Message) -> Iterator[Message]:
    """Yield a body in slices (views, not copies), and then its end, which leaves only after all of them."""
    body = message.get("body", b"")
    more_body = message.get("more_body", False)
    if not body or (more_body and len(body) <= SLICE_BYTES):
        yield message
        return
    view = memoryview(body)
    for start in range(0, len(body), SLICE_BYTES):
        piece = body if len(body) <= SLICE_BYTES else view[start : start + SLICE_BYTES]
        yield {**message, "body": piece, "more_body": True}
    if not more_body:
        yield {**message, "body": b"", "more_body": False}
