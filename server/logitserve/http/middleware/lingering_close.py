"""Answers to requests with an unread body: its rest is dropped before the connection is closed."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logitserve.http.scope import header

LINGER_SECONDS = 10.0
"""Longest time of reading from a client once its answer is out."""

MOST_DROPPED_BYTES = 256 << 20
"""Most bytes that are dropped for one request."""


class LingeringClose:
    """Reads and drops the rest of a body that its answer did not wait for, as nginx's lingering_close does.

    A socket that is closed with data unread resets the connection. A client that sends its whole body before it reads
    would then see the reset, and never the answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        seconds: float = LINGER_SECONDS,
        most_bytes: int = MOST_DROPPED_BYTES,
    ) -> None:
        self._app = app
        self._seconds = seconds
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send, is_body_held=_is_body_held(scope))
        await self._app(scope, exchange.receive, exchange.send)
        if exchange.end_is_held:
            await self._drop(receive)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _drop(self, receive: Receive) -> None:
        num_dropped = 0
        try:
            async with asyncio.timeout(self._seconds):
                while num_dropped < self._most_bytes:
                    message = await receive()
                    num_dropped += len(message.get("body", b""))
                    if not message.get("more_body", False):  # the end of the body, or of the connection
                        return
        except TimeoutError:
            return


class _Exchange:
    """A request and its response, whose end is held back while the request's body is unread.

    The client has the whole response all the same, by its declared length. A response without one ends as
    usual. So does one to a client that still holds its body back until `100 Continue`.
    """

    def __init__(self, receive: Receive, send: Send, *, is_body_held: bool) -> None:
        self._is_body_held = is_body_held
        self._receive = receive
        self._send = send
        self._is_read = False
        self._has_length = False
        self.end_is_held = False

    async def receive(self) -> Message:
        self._is_body_held = False
        message = await self._receive()
        if not message.get("more_body", False):
            self._is_read = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_length = any(
                name.lower() == b"content-length" for name, _ in message.get("headers", ())
            )
        elif (
            not message.get("more_body", False)
            and self._has_length
            and not self._is_read
            and not self._is_body_held
        ):
            self.end_is_held = True
            message = {**message, "more_body": True}
        await self._send(message)


def _has_body(scope: Scope) -> bool:
    """Return whether the request's head announces a body."""
    return header(scope, b"content-length").strip(b"0") != b"" or header(scope, b"transfer-encoding") != b""


def _is_body_held(scope: Scope) -> bool:
    """Return whether the client sends its body only after `100 Continue`. HTTP/1.0 has no such promise."""
    return header(scope, b"expect").lower() == b"100-continue" and scope.get("http_version") != "1.0"
