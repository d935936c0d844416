"""A response's way out: its head before its first piece, and something in its silences."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Self

from starlette.types import Message, Send

from logitserve.answers.answer import Piece


class Outlet:
    """Sends the pieces of one body. Used as a context, since it may be at work when its body ends.

    After ``silence_seconds`` without a piece, the head goes out if it has not, and then the bytes of
    ``fill_silence``. One timer serves all pieces, since a timer for each would cost every token of a stream.

    Args:
        head: makes the message that begins the response.
        silence_seconds: longest silence; 0 for no limit.

    Attributes:
        has_begun: whether the head is out, so that the response's status can no longer change.
        is_sending: whether a piece waits until the reader takes it.
    """

    def __init__(
        self,
        send: Send,
        head: Callable[[], Message],
        silence_seconds: float = 0.0,
        fill_silence: Callable[[], Iterable[Piece]] = tuple,
    ) -> None:
        self._send = send
        self._head = head
        self._silence_seconds = silence_seconds
        self._fill_silence = fill_silence
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._loop.time()
        self._sending_since = 0.0
        self._waited_seconds = 0.0
        self._filling: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.has_begun = False
        self.is_sending = False

    async def __aenter__(self) -> Self:
        if self._silence_seconds:
            self._timer = self._loop.call_later(self._silence_seconds, self._check)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.gather(self._filling, return_exceptions=True)

    @property
    def waited_seconds(self) -> float:
        """Seconds for which pieces have waited for the reader."""
        waiting = self._loop.time() - self._sending_since if self.is_sending else 0.0
        return self._waited_seconds + waiting

    def write(self, piece: Piece) -> Coroutine[Any, Any, None]:
        """Send a piece, after the head if it is the first."""
        return self._send_message({"type": "http.response.body", "body": piece, "more_body": True})

    def close(self) -> Coroutine[Any, Any, None]:
        """Send the body's end."""
        return self._send_message({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_message(self, message: Message) -> None:
        self._sending_since = self._loop.time()
        self.is_sending = True
        try:
            if self._filling is not None:
                await self._filling
                self._filling = None
            if not self.has_begun:
                await self._begin()
            await self._send(message)
        finally:
            self.is_sending = False
            self._sent_at = self._loop.time()
            self._waited_seconds += self._sent_at - self._sending_since

    async def _begin(self) -> None:
        self.has_begun = True
        await self._send(self._head())

    def _check(self) -> None:
        """Fill a silence that has lasted too long, and set the timer for the next one."""
        due = self._sent_at + self._silence_seconds
        now = self._loop.time()
        is_filling = self._filling is not None and not self._filling.done()
        if not (self.is_sending or is_filling or now < due):
            self._filling = asyncio.ensure_future(self._fill())
        self._timer = self._loop.call_at(due if now < due else now + self._silence_seconds, self._check)

    async def _fill(self) -> None:
        if not self.has_begun:
            await self._begin()
        for piece in self._fill_silence():
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
