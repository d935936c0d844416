"""Threads that tokenize, off the event loop and within a time bound."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from logitserve.errors import RETRY_AFTER_SECONDS, ApiError, BadRequestError

T = TypeVar("T")

NUM_THREADS = 2


class TokenizerWorkers:
    """A few threads for tokenizing, each of which does one request's work at a time.

    A thread cannot be interrupted: one whose work takes too long is taken until that work ends. Prompts are bounded in
    length before, so that it does end.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._pool = ThreadPoolExecutor(max_workers=NUM_THREADS, thread_name_prefix="tokenize")
        self._free_threads = asyncio.Semaphore(NUM_THREADS)

    async def run(self, work: Callable[[], T], *, param: str) -> T:
        """Return ``work()``. The time for a thread to come free and the time that the work takes are bounded apart.

        Raises ApiError 503 when no thread came free, and BadRequestError naming ``param`` when the work took too long.
        """
        try:
            async with asyncio.timeout(self._timeout):
                await self._free_threads.acquire()
        except TimeoutError:
            raise self._busy() from None
        call = asyncio.get_running_loop().run_in_executor(self._pool, work)
        call.add_done_callback(self._free_thread)
        try:
            async with asyncio.timeout(self._timeout):
                # Shielded, since a cancelled call would free a thread that still works.
                return await asyncio.shield(call)
        except TimeoutError:
            raise self._too_slow(param) from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _free_thread(self, call: asyncio.Future[Any]) -> None:
        self._free_threads.release()
        if not call.cancelled():
            call.exception()  # asyncio would log an exception that nobody looked at

    def _busy(self) -> ApiError:
        return ApiError(
            503,
            f"No thread was free to tokenize the prompt within {self._timeout:g} s (--tokenize-timeout); try again.",
            code="tokenizer_busy",
            headers={"Retry-After": RETRY_AFTER_SECONDS},
        )

    def _too_slow(self, param: str) -> BadRequestError:
        return BadRequestError(
            f"'{param}' took more than {self._timeout:g} s to tokenize (--tokenize-timeout).",
            param=param,
            code="tokenize_timeout",
        )
