"""Streamed answers, and answers that end their work when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi.responses import Response
from logitengine.errors import EngineError
from starlette.types import Receive, Scope, Send

from logitserve.errors import ApiError

logger = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientDisconnectedError(Exception):
    """Nobody waits for the answer any more."""


def event(data: bytes) -> bytes:
    """One event of JSON, which holds no line break."""
    return b"data: " + data + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """``work``'s result; it is cancelled, and has ended, when the client goes away first.

    Raises ClientDisconnectedError. The request's body must have been read.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnectedError
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class ByteStream(Response):
    """Sends pieces as they come, and waits while the client does not read.

    ``pieces`` and what they are made of, ``source``, are closed however it ends: closing a generator that never began runs
    nothing of it. A failure leaves the body without its end, so that the client's HTTP library sees that it is not whole.
    """

    def __init__(
        self, pieces: AsyncGenerator[bytes | memoryview, None], source: AsyncGenerator[Any, None]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._pieces = pieces
        self._source = source

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._source), contextlib.aclosing(self._pieces):
            with contextlib.suppress(ClientDisconnectedError):
                await until_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except (EngineError, ApiError) as error:
            logger.warning("a stream was cut off: %s", error)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class EventStream(ByteStream):
    """Server-sent events."""

    media_type = "text/event-stream"


class ArrowStream(ByteStream):
    """Arrow IPC messages."""

    media_type = "application/vnd.apache.arrow.stream"
