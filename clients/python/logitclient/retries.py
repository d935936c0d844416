"""When to ask again, and after how long. Knows neither clocks nor sockets, but for dates in Retry-After."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from logitclient.errors import APIError

RETRIED = frozenset({429, 503})
"""The statuses that say that nothing was begun. After any other failure the work may have been done, or is wrong."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with full jitter on top of what Retry-After asks for.

    Where Retry-After is over ``longest_wait`` seconds the error is raised instead: the caller knows better.
    ``random`` gives numbers in [0, 1).
    """

    max_retries: int
    random: Callable[[], float]
    first_backoff: float = 0.5
    longest_backoff: float = 8.0
    longest_wait: float = 60.0

    def delay(self, retries_done: int, error: APIError) -> float | None:
        """Seconds to wait before the next try; None to raise ``error``."""
        wait = error.retry_after or 0.0
        if error.status not in RETRIED or retries_done >= self.max_retries or wait > self.longest_wait:
            return None
        return wait + self.random() * min(self.longest_backoff, self.first_backoff * 2.0**retries_done)


def parse_retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header, which gives them or a date; None where there is none that can be read."""
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
