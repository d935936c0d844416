"""Threads for work that a step must not wait for."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

NICENESS = 5
"""Added to the niceness of the threads: steps go first where cores are scarce."""

_Work = tuple["Future[Any]", Callable[[], Any]]


class Workers:
    """A few daemon threads, started with the first work.

    The interpreter joins the threads of a ThreadPoolExecutor when it exits, and a grammar may compile for minutes.
    """

    def __init__(self, name: str, num_threads: int) -> None:
        self._name = name
        self._num_threads = num_threads
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._running: set[Future[Any]] = set()
        self._has_started = False

    @property
    def is_busy(self) -> bool:
        """Whether a thread works."""
        return bool(self._running)

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have a thread call the function. Called by one thread at a time; what has not begun can be cancelled."""
        if not self._has_started:
            self._has_started = True
            for number in range(self._num_threads):
                threading.Thread(
                    target=_work,
                    args=(self._queue, self._running),
                    name=f"{self._name}-{number}",
                    daemon=True,
                ).start()
            weakref.finalize(self, _end, self._queue, self._num_threads).atexit = False
        future: Future[T] = Future()
        self._queue.put((future, lambda: function(*args, **kwargs)))
        return future


def _work(queue: SimpleQueue[_Work | None], running: set[Future[Any]]) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
    while (work := queue.get()) is not None:
        future, function = work
        if future.set_running_or_notify_cancel():
            running.add(future)
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001 - a panic of llguidance is no Exception
                running.discard(future)
                future.set_exception(error)
            else:
                running.discard(future)
                future.set_result(result)
                del result
        del work, future, function


def _end(queue: SimpleQueue[_Work | None], num_threads: int) -> None:
    for _ in range(num_threads):
        queue.put(None)
