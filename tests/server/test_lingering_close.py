"""The rest of a body whose request is already answered: read up to limits, and never kept."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
from logitserve.http.middleware.lingering_close import LingeringClose
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

pytestmark = pytest.mark.anyio

WITH_LENGTH = [(b"content-length", b"100000000000")]
CHUNKED = [(b"transfer-encoding", b"chunked")]


async def refusing(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer without a look at the body."""
    await PlainTextResponse("no", 413)(scope, receive, send)


async def reading(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer after the whole body is read."""
    while (await receive())["more_body"]:
        pass
    await PlainTextResponse("yes")(scope, receive, send)


class Piece(bytearray):
    """Bytes that allow a weak reference."""


class Client:
    """Client that sends ``count`` pieces of an endless body, then nothing, and keeps the app's messages."""

    def __init__(self, count: int, *, more_body: bool = True) -> None:
        self._count = count
        self._more_body = more_body
        self._pieces: list[weakref.ref[Piece]] = []
        self.num_sent = 0
        self.most_alive = 0
        self.told: list[Message] = []
        self.sent_before_told: list[int] = []

    async def receive(self) -> Message:
        self.most_alive = max(self.most_alive, sum(piece() is not None for piece in self._pieces))
        if self.num_sent == self._count:
            await asyncio.Event().wait()
        self.num_sent += 1
        piece = Piece(1000)
        self._pieces.append(weakref.ref(piece))
        return {"type": "http.request", "body": piece, "more_body": self._more_body}

    async def send(self, message: Message) -> None:
        self.told.append(message)
        self.sent_before_told.append(self.num_sent)

    async def ask(
        self, app: ASGIApp, headers: list[tuple[bytes, bytes]], **limits: Any
    ) -> list[tuple[bytes, bool]]:
        """Return the body of each of the answer's messages, and its ``more_body``."""
        scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
        await LingeringClose(app, **limits)(scope, self.receive, self.send)
        return [(message["body"], message.get("more_body", False)) for message in self.told[1:]]


@pytest.mark.parametrize("headers", [WITH_LENGTH, CHUNKED], ids=["length", "chunked"])
async def test_the_answer_comes_first_and_then_a_bounded_rest_is_dropped(
    headers: list[tuple[bytes, bytes]],
) -> None:
    client = Client(200)
    assert await client.ask(refusing, headers, most_bytes=100_000) == [(b"no", True), (b"", False)]
    assert client.sent_before_told == [0, 0, 100]
    assert client.most_alive <= 1


async def test_a_client_that_sends_nothing_is_waited_for_no_longer_than_the_limit() -> None:
    client = Client(3)
    assert await client.ask(refusing, WITH_LENGTH, seconds=0.02) == [(b"no", True), (b"", False)]
    assert client.num_sent == 3


async def test_a_body_that_ends_is_not_read_further() -> None:
    client = Client(200, more_body=False)
    await client.ask(refusing, WITH_LENGTH)
    assert client.num_sent == 1


@pytest.mark.parametrize(
    ("app", "headers"),
    [(reading, WITH_LENGTH), (refusing, []), (refusing, [(b"content-length", b"0")])],
    ids=["read body", "no body", "empty body"],
)
async def test_other_answers_pass_as_they_are(app: ASGIApp, headers: list[tuple[bytes, bytes]]) -> None:
    client = Client(1, more_body=False)
    ((_, more_body),) = await client.ask(app, headers)
    assert not more_body
    assert client.num_sent == (1 if app is reading else 0)


async def test_a_body_that_waits_to_be_asked_for_is_not_waited_for() -> None:
    client = Client(0)
    held = [*WITH_LENGTH, (b"expect", b"100-Continue")]
    assert await client.ask(refusing, held) == [(b"no", False)]


async def test_an_answer_without_a_length_ends_at_once() -> None:
    """The client of such an answer learns from its end that it is whole."""

    async def streaming(scope: Scope, receive: Receive, send: Send) -> None:
        async def parts() -> AsyncIterator[bytes]:
            yield b"no"

        await StreamingResponse(parts())(scope, receive, send)

    client = Client(0)
    assert await client.ask(streaming, CHUNKED) == [(b"no", True), (b"", False)]
