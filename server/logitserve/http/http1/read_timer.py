"""The time that a client has to send a request's head and its body."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from logitserve.config import Times
from logitserve.errors import ApiError

LEAST_BODY_BYTES = 64 << 10
"""Bytes that every ``body_timeout`` seconds must bring, unless they bring the body's end."""


class ReadTimer:
    """The timer of one connection. It hands a 408 to ``fail`` when a head or a body does not come in time.

    A period in which this server did not read (``is_paused``) is not the client's fault.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        times: Times,
        fail: Callable[[ApiError], None],
        is_paused: Callable[[], bool],
    ) -> None:
        self._loop = loop
        self._times = times
        self._fail = fail
        self._is_paused = is_paused
        self._handle: asyncio.TimerHandle | None = None
        self._period_bytes = 0
        self._was_paused = False

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def call_later(self, seconds: float, work: Callable[[], None]) -> None:
        """Call ``work`` after ``seconds``, unless a head or a body comes before."""
        self.stop()
        self._handle = self._loop.call_later(seconds, work)

    def expect_head(self) -> None:
        self._expect(self._times.head_timeout, self._on_slow_head)

    def expect_body(self) -> None:
        self._expect(self._times.body_timeout, self._on_period)

    def _expect(self, seconds: float, at_end: Callable[[], None]) -> None:
        self._period_bytes = 0
        self._was_paused = self._is_paused()
        self.call_later(seconds, at_end)

    def count_body(self, nbytes: int) -> None:
        """Count bytes of a body that have come."""
        self._period_bytes += nbytes

    def paused(self) -> None:
        """Remember that reading was paused in this period."""
        self._was_paused = True

    def _on_slow_head(self) -> None:
        if self._was_paused:
            self.expect_head()
            return
        seconds = self._times.head_timeout
        self._fail(ApiError(408, f"The request's head took longer than {seconds:g} s (--head-timeout)."))

    def _on_period(self) -> None:
        if self._was_paused or self._period_bytes >= LEAST_BODY_BYTES:
            self.expect_body()
            return
        self._fail(
            ApiError(
                408,
                f"{self._times.body_timeout:g} s brought less than {LEAST_BODY_BYTES} bytes of the body, and not its end "
                "(--body-timeout).",
            )
        )
