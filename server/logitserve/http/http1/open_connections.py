"""The server's open connections: their limit, and their end with the server's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
from typing import Protocol

logger = logging.getLogger(__name__)

RESERVED_FILES = 128
"""File descriptors left for everything else: listeners, the engine's socket, pipes, files."""


class Member(Protocol):
    """Methods by which a connection is ended."""

    def drop(self) -> None:
        """Close at once. Called before any request on this connection."""

    def drain(self) -> None:
        """Let answers that have not begun say that the connection ends with them."""

    def end(self) -> None:
        """Close as soon as every request is answered."""


class OpenConnections:
    """Counts connections. Once there are ``limit``, a newcomer takes the place of the oldest silent one.

    A connection is silent until its first request. So silent connections, however many, keep no client out.
    While none is silent, newcomers are turned away.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: set[Member] = set()
        self._silent: dict[Member, None] = {}  # oldest first
        self._is_full = False
        self.is_draining = False
        self.none_left = asyncio.Event()
        self.none_left.set()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Member) -> bool:
        """Count a new connection.

        Returns False if there are too many: then it is not counted and must be closed.
        """
        if len(self._open) >= self._limit and not self._drop_silent():
            if not self._is_full:
                logger.warning("%d connections are open (--max-connections); others are refused", self._limit)
            self._is_full = True
            return False
        self._open.add(connection)
        self._silent[connection] = None
        self.none_left.clear()
        return True

    def spoke(self, connection: Member) -> None:
        """Remember that a request has begun on this connection."""
        self._silent.pop(connection, None)

    def remove(self, connection: Member) -> None:
        """Forget a closed connection, or one that was not counted."""
        self._silent.pop(connection, None)
        if connection not in self._open:
            return
        self._open.remove(connection)
        self._is_full = False
        if not self._open:
            self.none_left.set()

    def drain(self) -> None:
        """Let every answer that has not begun, and later ones, end its connection."""
        self.is_draining = True
        for connection in list(self._open):
            connection.drain()

    def end(self) -> None:
        """Close what is idle, and the others after their answers."""
        for connection in list(self._open):
            connection.end()

    def _drop_silent(self) -> bool:
        oldest = next(iter(self._silent), None)
        if oldest is None:
            return False
        self.remove(oldest)
        oldest.drop()
        return True


def affordable_connections(wanted: int) -> int:
    """Return how many of the ``wanted`` connections the limit on open files allows.

    That limit is raised before, as far as necessary and possible.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    # A limit that leaves next to nothing gives half to connections.
    affordable = max(soft - RESERVED_FILES, soft // 2)
    logger.warning(
        "%d connections are possible, not %d (--max-connections): the limit on open files is %d (ulimit -n)",
        affordable,
        wanted,
        soft,
    )
    return affordable
