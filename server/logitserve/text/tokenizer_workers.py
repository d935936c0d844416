"""Threads that tokenize, off the event loop and within a time bound."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from logitserve.errors import BadRequestError

T = TypeVar("T")


class TokenizerWorkers:
    """A few threads for tokenizing. A call that takes too long is refused; its thread ends by itself.

    The prompt's length is bounded before, so that no thread is lost for good.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    async def run(self, work: Callable[[], T], *, param: str) -> T:
        """``work()``'s result. Raises BadRequestError when the time is up."""
        call = asyncio.get_running_loop().run_in_executor(self._pool, work)
        try:
            return await asyncio.wait_for(call, self._timeout)
        except TimeoutError:
            raise BadRequestError(
                f"'{param}' took more than {self._timeout:g} s to tokenize.",
                param=param,
                code="tokenize_timeout",
            ) from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
