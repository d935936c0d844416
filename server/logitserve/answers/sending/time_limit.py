"""The time limit of a request's work."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

from logitserve.answers.sending.outlet import Outlet
from logitserve.errors import ApiError

CHECKS = 4
"""Number of checks in the length of a limit.

Once the limit is over, they look for a piece that waits for the reader.
"""


class TimeLimit:
    """Ends its block after ``seconds`` with ApiError 504; 0 is no limit.

    Time for which a piece of the answer waits for its reader is the client's and does not count. No piece is
    cut off, so that an error may follow it.
    """

    def __init__(self, seconds: float, outlet: Outlet) -> None:
        self._seconds = seconds
        self._outlet = outlet
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Any] | None = None
        self._num_cancelled = 0
        self._is_over = False

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        if self._seconds and self._task is not None:
            self._num_cancelled = self._task.cancelling()
            self._timer = self._loop.call_later(self._seconds, self._check, self._task)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._is_over and self._task is not None:
            is_only_ours = self._task.uncancel() <= self._num_cancelled
            if is_only_ours and isinstance(error, asyncio.CancelledError):
                raise self._too_long() from None

    def _check(self, task: asyncio.Task[Any]) -> None:
        left = self._started + self._seconds + self._outlet.waited_seconds - self._loop.time()
        if left <= 0 and not self._outlet.is_sending:
            # asyncio.timeout would cancel a moment later, when a piece may be on its way.
            self._is_over = True
            task.cancel()
            return
        delay = left if left > 0 else self._seconds / CHECKS
        self._timer = self._loop.call_later(delay, self._check, task)

    def _too_long(self) -> ApiError:
        return ApiError(
            504,
            f"The answer was not complete after {self._seconds:g} s (--request-timeout).",
            code="request_timeout",
            headers={"x-should-retry": "false"},
        )
