"""Retries of failed calls: the policy, and the loop that follows it."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from logitclient.errors import APIError, LogitClientError, TransportError

T = TypeVar("T")

RETRIED = frozenset({429, 503})
"""Statuses of a server that began nothing. After any other failure the work may have been done."""

MOST_DOUBLINGS = 60


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with full jitter, on top of the seconds in Retry-After.

    A Retry-After over ``longest_wait`` seconds is not waited for: the error is raised, and the caller decides.
    No try begins later than ``max_seconds`` after the first failure. ``random`` gives numbers in [0, 1).
    ``on_transport_errors`` adds broken connections, for calls that may be done twice.
    """

    max_retries: float
    random: Callable[[], float]
    first_backoff: float = 0.5
    longest_backoff: float = 8.0
    longest_wait: float = 60.0
    max_seconds: float = math.inf
    on_transport_errors: bool = False

    def delay(self, retries_done: int, error: LogitClientError, seconds: float = 0.0) -> float | None:
        """Return the wait in seconds before the next try, or None to raise ``error``.

        ``seconds`` have passed since the first failure.
        """
        retry_after = error.retry_after or 0.0 if isinstance(error, APIError) else 0.0
        if not self._covers(error) or retries_done >= self.max_retries or retry_after > self.longest_wait:
            return None
        backoff = min(self.longest_backoff, self.first_backoff * 2.0 ** min(retries_done, MOST_DOUBLINGS))
        wait = retry_after + self.random() * backoff
        return None if seconds + wait > self.max_seconds else wait

    def _covers(self, error: LogitClientError) -> bool:
        if isinstance(error, APIError):
            return error.status in RETRIED
        return self.on_transport_errors and isinstance(error, TransportError)


class Failures:
    """The failures of one call so far."""

    def __init__(self, policy: RetryPolicy, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._clock = clock
        self._count = 0
        self._first_time: float | None = None

    def delay(self, error: LogitClientError) -> float:
        """Note a failure, and return the wait before the next try. Raises ``error`` where no try is left."""
        now = self._clock()
        if self._first_time is None:
            self._first_time = now
        delay = self._policy.delay(self._count, error, now - self._first_time)
        if delay is None:
            raise error
        self._count += 1
        return delay


def with_retries(
    call: Callable[[], T],
    policy: RetryPolicy,
    sleep: Callable[[float], None],
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Return the result of ``call``, tried as often as ``policy`` allows. Raises the last failure."""
    failures = Failures(policy, clock)
    while True:
        try:
            return call()
        except LogitClientError as error:
            delay = failures.delay(error)
        sleep(delay)


async def with_retries_async(
    call: Callable[[], Awaitable[T]],
    policy: RetryPolicy,
    sleep: Callable[[float], Awaitable[None]],
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Do the same as ``with_retries``, for asyncio and trio."""
    failures = Failures(policy, clock)
    while True:
        try:
            return await call()
        except LogitClientError as error:
            delay = failures.delay(error)
        await sleep(delay)


def parse_retry_after(value: str | None) -> float | None:
    """Return the seconds until a Retry-After header is over: it holds seconds or a date. None for anything else."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None
