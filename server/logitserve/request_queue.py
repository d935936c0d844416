"""Queue of requests that wait to be tokenized or for their turn in the engine, bounded in all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Self

from logitserve.errors import ApiError

LONGEST_RETRY_SECONDS = 30
"""Longest Retry-After: long queues often empty sooner than they filled."""

RECENT = 1 / 8
"""Weight of the newest wait in the mean of recent waits."""


class Place:
    """A request's place in the queue. Used as a context, which ends with its wait or before."""

    def __init__(self, queue: RequestQueue, num_tokens: int, now: float) -> None:
        self._queue: RequestQueue | None = queue
        self._num_tokens = num_tokens
        self._since = now

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def begin(self) -> None:
        """Leave, since the request's turn has come."""
        if self._queue is not None:
            self._queue.note_wait(self._since)
        self.leave()

    def leave(self) -> None:
        """Stop counting the request."""
        if self._queue is not None:
            self._queue.num_requests -= 1
            self._queue.num_tokens -= self._num_tokens
            self._queue = None


class RequestQueue:
    """Counts requests, and the tokens of their prompts, until the engine has begun them.

    Both bounds are checked when a request comes. So the queue exceeds the bound on tokens by one request at
    most, and an empty queue takes a long request.

    Args:
        clock: seconds, monotonic.

    Attributes:
        num_requests, num_tokens: requests that wait at the moment, and tokens of their prompts.
    """

    def __init__(
        self, max_requests: int, max_tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._clock = clock
        self._recent_wait = 0.0
        self.num_requests = 0
        self.num_tokens = 0

    def enter(self, num_tokens: int) -> Place:
        """Take a place for a request that has just come. Raises ApiError 429 where there is none."""
        if self.num_requests >= self._max_requests:
            raise self.full(f"{self.num_requests} requests are waiting already (--max-queued-requests)")
        if self.num_tokens >= self._max_tokens:
            raise self.full(f"prompts of {self.num_tokens} tokens are waiting already (--max-queued-tokens)")
        return self.stay(num_tokens)

    def stay(self, num_tokens: int) -> Place:
        """Take a place for a request that had one before it was tokenized."""
        self.num_requests += 1
        self.num_tokens += num_tokens
        return Place(self, num_tokens, self._clock())

    def note_wait(self, since: float) -> None:
        """Take a wait that ended into account for `retry_after`."""
        self._recent_wait += RECENT * (self._clock() - since - self._recent_wait)

    @property
    def retry_after(self) -> dict[str, str]:
        """Return the header with the time of another try: as long as others have waited lately."""
        seconds = min(LONGEST_RETRY_SECONDS, max(1, math.ceil(self._recent_wait)))
        return {"Retry-After": str(seconds)}

    def full(self, reason: str) -> ApiError:
        """Return the refusal of a request for which there is no room."""
        return ApiError(
            429,
            f"The server is full: {reason}; try again.",
            code="engine_overloaded",
            headers=self.retry_after,
        )
