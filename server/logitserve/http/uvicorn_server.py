"""The server process: uvicorn with bounded request heads, and a shutdown that lets running requests end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from logitengine.link.engine_protocol import EngineProtocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from logitserve.banner import announce
from logitserve.config import ServerConfig
from logitserve.http.app import create_app
from logitserve.http.connection import EXTENSION, Connection
from logitserve.state import ServerState

logger = logging.getLogger(__name__)

LAST_SECONDS = 2
"""Seconds that uvicorn waits for connections once draining is over, before it cancels what still runs."""


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains before it ends.

    The first SIGINT or SIGTERM turns new requests away and waits for the running ones. The second ends the server.
    """

    def __init__(
        self, config: uvicorn.Config, state: ServerState, drain_timeout: float, stopped: asyncio.Event
    ) -> None:
        super().__init__(config)
        self._stopped = stopped
        self._state = state
        self._drain_timeout = drain_timeout
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: Any = None) -> None:
        """Listen, unless the server was stopped before it took the signals."""
        if self._stopped.is_set():
            self.should_exit = True
        else:
            await super().startup(sockets)

    def stop(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """Drain, or end at a second signal. uvicorn's own handler would raise the signal again and lose exit code 0."""
        if self._state.draining or self._loop is None:
            self.force_exit = sig == signal.SIGINT
            self.should_exit = True
            return
        self._state.draining = True
        self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        logger.info("draining", extra={"requests": self._state.num_in_flight})
        try:
            await asyncio.wait_for(self._state.idle.wait(), self._drain_timeout)
        except TimeoutError:
            logger.warning(
                "still running after the drain timeout", extra={"requests": self._state.num_in_flight}
            )
        self.should_exit = True


class ConnectionProtocol(HttpToolsProtocol):
    """uvicorn's httptools protocol, with a Connection in the scope of every request."""

    _connection: Connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._connection = Connection(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.release()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._connection.limit_unsent(None)
        extensions: dict[str, Any] = {EXTENSION: self._connection}
        self.scope["extensions"] = extensions


def bounded_protocol(max_header_bytes: int) -> type[HttpToolsProtocol]:
    """Return a protocol that refuses request heads over ``max_header_bytes``. uvicorn's own takes any size."""

    class BoundedProtocol(ConnectionProtocol):
        _head_bytes = 0
        _in_head = True

        def data_received(self, data: bytes) -> None:
            if self._in_head:
                self._head_bytes += len(data)
            super().data_received(data)
            # Bytes that came with the end of the head are body. A head without end is cut off here.
            if self._in_head and self._head_bytes > max_header_bytes and not self.transport.is_closing():
                self.send_400_response("Request head too large.")

        def on_header(self, name: bytes, value: bytes) -> None:
            super().on_header(name, value)
            if sum(len(key) + len(text) for key, text in self.headers) > max_header_bytes:
                msg = "request head too large"
                raise ValueError(msg)

        def on_headers_complete(self) -> None:
            self._in_head = False
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._in_head, self._head_bytes = True, 0

    return BoundedProtocol


def uvicorn_config(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=bounded_protocol(config.max_header_bytes),
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_SECONDS,
    )


async def run_app(
    engine: EngineProtocol, config: ServerConfig, listeners: list[socket.socket], stopped: asyncio.Event
) -> int:
    """Serve on bound sockets until a signal, or not at all if ``stopped`` is set.

    Returns the exit code: 0, or 1 when the model could not be loaded.
    """
    app = create_app(engine, config)
    state: ServerState = app.state.server
    server = DrainingServer(uvicorn_config(app, config), state, config.drain_timeout, stopped)
    state.on_load_error = server.stop
    state.on_ready = lambda model: announce(model, config, listeners)
    await server.serve(listeners)
    return 0 if state.load_error is None else 1
