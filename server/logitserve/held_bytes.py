"""The budget of answers in this process: unread outputs of streams, and whole answers in the making."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from logitserve.errors import RETRY_AFTER_SECONDS, ApiError

WINDOW_COST = 2
"""Bytes charged for each byte of a window: outputs overshoot it by a step, and one of them may be encoded beside it."""

SMALL_PART = 4096
"""The part of the budget that is small. Windows up to that size are granted whole, and an eighth of the budget is kept for
them. Every whole answer may hold as much without waiting: text, log-probabilities and a few rows never wait for a large one.
"""

SMALLEST_SHARE = 16
"""A larger window takes at most this part of the bytes left, so that others always find room."""


class Window:
    """Bytes of one request's outputs that may be unread. Its holder closes it when the request is over."""

    def __init__(self, held: HeldBytes, nbytes: int) -> None:
        self._held = held
        self._cost = WINDOW_COST * nbytes
        self.nbytes = nbytes

    def close(self) -> None:
        self._held.windows_left += self._cost
        self._cost = 0


class HeldBytes:
    """The budget of one server, half of it for windows and half for whole answers.

    Windows are granted or refused at once; they shrink as the budget does. Whole answers reserve bytes as they grow and
    wait for each other, but the oldest never waits: so one of them always goes on, and all end. It may exceed the budget
    by the most that one answer may hold, and every other one by a small part.

    Attributes:
        small: bytes of that part.
        windows_left: bytes that are left for windows.
    """

    def __init__(self, limit: int, wait_seconds: float | None = None) -> None:
        """Take the budget in bytes, and the longest wait of an answer for others; None for no limit."""
        self._limit = limit
        self._wait_seconds = wait_seconds
        self.small = limit // SMALL_PART
        self.windows_left = limit // 2
        self._answers_left = limit - limit // 2
        self._answers: list[AnswerBytes] = []  # by age
        self._num_waiting = 0

    def fits(self, nbytes: int) -> bool:
        """Return whether a window of this size could be granted if there were no others."""
        return WINDOW_COST * nbytes <= self._limit // 2

    def window(self, wanted: int, least: int, *, is_owed: bool = False) -> Window | None:
        """Return a window of at most ``wanted`` bytes and, where that is less, at least ``least``; else None.

        A window that ``is_owed`` is granted whatever is left, because its request holds up others until it
        goes on.
        """
        least = min(wanted, least)
        nbytes = wanted
        if wanted > self.small:
            left = self.windows_left - self._limit // 8
            nbytes = min(wanted, max(least, self.small, left // (WINDOW_COST * SMALLEST_SHARE)))
        if WINDOW_COST * nbytes > self.windows_left:
            nbytes = least
        if WINDOW_COST * nbytes > self.windows_left and not is_owed:
            return None
        self.windows_left -= WINDOW_COST * nbytes
        return Window(self, nbytes)

    @property
    def num_window_bytes(self) -> int:
        """Bytes that are charged for windows."""
        return self._limit // 2 - self.windows_left

    @property
    def num_answer_bytes(self) -> int:
        """Bytes that whole answers hold."""
        return sum(answer.nbytes for answer in self._answers)

    def answer(self) -> AnswerBytes:
        """Return the account of one more whole answer, to be used as a context."""
        answer = AnswerBytes(self)
        self._answers.append(answer)
        return answer

    def take(self, answer: AnswerBytes, nbytes: int) -> None:
        """Charge ``nbytes``. A number below zero gives bytes back, and answers that wait for them go on."""
        answer.nbytes += nbytes
        self._answers_left -= nbytes
        if nbytes < 0:
            self.grant()

    def forget(self, answer: AnswerBytes) -> None:
        self._answers.remove(answer)
        self.take(answer, -answer.nbytes)
        self.grant()

    def allows(self, answer: AnswerBytes, nbytes: int) -> bool:
        """Return whether the answer may hold ``nbytes`` more."""
        is_small = answer.nbytes + nbytes <= self.small
        return is_small or answer is self._answers[0] or nbytes <= self._answers_left

    async def wait(self, answer: AnswerBytes, nbytes: int) -> None:
        """Charge ``nbytes`` once that is allowed. Raises TimeoutError after the longest wait."""
        reservation = answer.waiting = _Reservation(nbytes, asyncio.get_running_loop().create_future())
        self._num_waiting += 1
        try:
            async with asyncio.timeout(self._wait_seconds):
                await reservation.granted
        finally:
            answer.waiting = None
            self._num_waiting -= 1

    def grant(self) -> None:
        """Serve reservations, the oldest answer's first.

        One that does not fit does not hold up the others.
        """
        if not self._num_waiting:
            return  # the case at nearly every delta
        for answer in self._answers:
            waiting = answer.waiting
            if waiting is None or waiting.granted.done():
                continue
            if self.allows(answer, waiting.nbytes):
                self.take(answer, waiting.nbytes)
                waiting.granted.set_result(None)


@dataclass(frozen=True, slots=True)
class _Reservation:
    nbytes: int
    granted: asyncio.Future[None]


class AnswerBytes:
    """Bytes that one whole answer holds, from its first row until it is sent."""

    def __init__(self, held: HeldBytes) -> None:
        self._held = held
        self.nbytes = 0
        self.waiting: _Reservation | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.forget(self)

    async def reserve(self, nbytes: int) -> None:
        """Wait until there is room for ``nbytes`` more, or no older answer is left. Raises ApiError 503 after --held-timeout."""
        if self._held.allows(self, nbytes):
            self._held.take(self, nbytes)
            return
        try:
            await self._held.wait(self, nbytes)
        except TimeoutError:
            raise ApiError(
                503,
                "Other answers have taken up --max-held-bytes for --held-timeout. Stream the answer, or try again.",
                code="too_many_bytes_held",
                headers={"Retry-After": RETRY_AFTER_SECONDS},
            ) from None

    def settle(self, nbytes: int) -> None:
        """Hold ``nbytes`` in all: bytes that were reserved and not used go back."""
        self._held.take(self, nbytes - self.nbytes)
