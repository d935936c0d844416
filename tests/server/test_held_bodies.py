"""Bytes of bodies that are being read: bounded in all, and given back however a request ends."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from scripted_engine import App, OpenApp
from starlette.types import Message

pytestmark = pytest.mark.anyio

LIMIT = 1000
SCOPE = {
    "type": "http",
    "http_version": "1.1",
    "method": "POST",
    "path": "/tokenize",
    "query_string": b"",
    "headers": [(b"host", b"test")],
}


class Sender:
    """A client that sends a piece of its body, and the rest on a signal of the test."""

    def __init__(self, app: App, piece: bytes) -> None:
        self._app = app
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._is_read = asyncio.Event()
        self._received: list[Any] = []
        self.push({"type": "http.request", "body": piece, "more_body": True})
        self._task = asyncio.create_task(app.asgi({**SCOPE}, self._receive, self._send))

    def push(self, message: Message) -> None:
        self._messages.put_nowait(message)

    async def _receive(self) -> Message:
        if self._messages.empty():
            self._is_read.set()
        return await self._messages.get()

    async def _send(self, message: Message) -> None:
        self._received.append(message)

    async def wait_read(self) -> None:
        """Wait until the app has the first piece and wants the next."""
        async with asyncio.timeout(30):
            await self._is_read.wait()

    async def answer(self) -> tuple[int, Any, dict[bytes, bytes]]:
        """Wait for the app and return status, document and headers."""
        async with asyncio.timeout(30):
            await self._task
        body = b"".join(message.get("body", b"") for message in self._received[1:])
        return self._received[0]["status"], orjson.loads(body), dict(self._received[0]["headers"])


def end(piece: bytes) -> Message:
    return {"type": "http.request", "body": piece, "more_body": False}


async def test_bodies_beyond_the_bound_in_all_are_turned_away_until_others_are_read(
    open_app: OpenApp,
) -> None:
    async with open_app(max_total_body_bytes=LIMIT) as app:
        first = Sender(app, b'{"prompt": "' + b"a" * 700)
        await first.wait_read()
        status, refusal, headers = await Sender(app, b" " * 400).answer()
        assert (status, refusal["error"]["code"]) == (429, "too_many_body_bytes")
        assert headers[b"retry-after"]
        small = Sender(app, b'{"prompt"')
        small.push(end(b': "a"}'))
        assert (await small.answer())[0] == 200
        first.push(end(b'"}'))
        assert (await first.answer())[0] == 200
        large = Sender(app, b'{"prompt": "' + b"a" * 700)
        large.push(end(b'"}'))
        assert (await large.answer())[0] == 200
        assert app.state.held_bodies.nbytes == 0


async def test_a_client_that_leaves_gives_its_bytes_back(open_app: OpenApp) -> None:
    async with open_app(max_total_body_bytes=LIMIT) as app:
        leaver = Sender(app, b" " * 700)
        await leaver.wait_read()
        assert app.state.held_bodies.nbytes == 700
        leaver.push({"type": "http.disconnect"})
        await leaver.answer()
        assert app.state.held_bodies.nbytes == 0
