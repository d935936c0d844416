"""The server process: uvicorn with our HTTP protocol, and an end that loses no request."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import socket
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, cast

import uvicorn
from logitengine.link.engine_protocol import EngineProtocol
from starlette.types import ASGIApp

from logitserve.banner import announce
from logitserve.config import ServerConfig
from logitserve.errors import ApiError
from logitserve.http.app import create_app
from logitserve.http.backlog import accept_backlog
from logitserve.http.http1.open_connections import OpenConnections, affordable_connections
from logitserve.http.http1.protocol import HttpProtocol
from logitserve.http.listener import ListenError, listen, on_loopback
from logitserve.state import ServerState

logger = logging.getLogger(__name__)

ACCEPTING_TURNS = 2
"""Turns of the event loop from a connection's acceptance to its protocol's start."""

LAST_SECONDS = 2
"""Seconds that uvicorn waits for connections once draining is over, before it cancels open requests."""


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains before it ends.

    At the first SIGINT or SIGTERM /ready turns to 503, and answers end their connections. After
    ``drain_delay`` every client that has connected is accepted, and the listeners are closed. Accepted
    requests are answered within ``drain_timeout``. The second signal ends the server at once.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        open_connections: OpenConnections,
        listeners: list[socket.socket],
        stopped: asyncio.Event,
    ) -> None:
        super().__init__(config)
        self.servers = []  # uvicorn sets it when it listens, and a signal may come before
        self._stopped = stopped
        self._state = state
        self._open_connections = open_connections
        self._listeners = listeners
        self._to_listen = listeners.copy()
        self._tasks: set[asyncio.Task[None]] = set()
        self._app_began = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.listen_error: ListenError | None = None

    async def serve(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)
        if self.force_exit and self._app_began:
            # uvicorn leaves it out, and logs an error when the app is cancelled.
            await self.lifespan.shutdown()

    async def startup(self, sockets: Any = None) -> None:  # noqa: ARG002 - uvicorn's signature
        """Start the app, and listen unless the server was stopped before."""
        if self._stopped.is_set():
            self.should_exit = True
            return
        self._app_began = True
        try:
            await super().startup(self._listening())
        except ListenError as error:
            self.listen_error = error
            for server in self.servers:
                server.close()
            for listener in self._listeners:
                listener.close()
            self.should_exit = True
            await self.lifespan.shutdown()
        else:
            if self._state.config.listen_when_ready and self._to_listen:
                announce(self._state.model(), self._state.config, self._listeners)

    def _listening(self) -> Any:
        """Yield each socket once it listens. uvicorn asks for the first when the app has started.

        Another server may have taken a port that was only bound, and uvloop tells nobody that it cannot listen.
        """
        for listener in self._to_listen:
            listen(listener)
            yield listener

    def stop(self) -> None:
        self.should_exit = True
        # uvicorn listens on what the list holds once the app has started. The app may wait for the model.
        self._to_listen.clear()
        self._state.load_ended.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """Drain, or end at a second signal. uvicorn's own handler would raise the signal again and lose exit code 0."""
        if self._state.draining or self._loop is None:
            self.force_exit = self.should_exit = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._stop_draining)
            return
        self._state.draining = True
        self._loop.call_soon_threadsafe(lambda: self._start(self._drain()))

    def _stop_draining(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drain(self) -> None:
        try:
            await self._let_end()
        finally:
            self.should_exit = True

    async def _let_end(self) -> None:
        config = self._state.config
        logger.info("draining", extra={"requests": self._state.num_in_flight})
        if not self.started:
            self.stop()
            return
        self._open_connections.drain()
        await asyncio.sleep(config.drain_delay)
        await accept_backlog(self._listeners, are_ours=config.fd is None)
        for server in self.servers:
            server.close()
        for _ in range(ACCEPTING_TURNS):
            await asyncio.sleep(0)
        self._open_connections.end()
        try:
            async with asyncio.timeout(config.drain_timeout):
                await self._open_connections.none_left.wait()
                await self._state.idle.wait()
        except TimeoutError:
            extra = {"requests": self._state.num_in_flight}
            logger.warning("still running after the drain timeout", extra=extra)
            self._start(self._state.engine.close())  # open requests end with an error that is sent


def uvicorn_config(
    app: ASGIApp,
    config: ServerConfig,
    open_connections: OpenConnections,
    refused: Callable[[ApiError], None] = lambda _: None,
) -> uvicorn.Config:
    """Return uvicorn's options. ``refused`` is called with each error that is told before there is a request."""
    protocol = functools.partial(
        HttpProtocol, options=config, open_connections=open_connections, refused=refused
    )
    return uvicorn.Config(
        app,
        http=cast("type[asyncio.Protocol]", protocol),  # uvicorn only calls it
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=bool(config.forwarded_allow_ips),
        forwarded_allow_ips=config.forwarded_allow_ips,
        server_header=False,
        timeout_keep_alive=config.keep_alive,
        timeout_graceful_shutdown=LAST_SECONDS,
    )


async def run_app(
    engine: EngineProtocol, config: ServerConfig, listeners: list[socket.socket], stopped: asyncio.Event
) -> int:
    """Serve on bound sockets until a signal, or not at all if ``stopped`` is set.

    Returns the exit code: 0, or 1 when the model could not be loaded or its engine kept dying. Raises CheckpointError for
    a model that cannot be served, and ListenError when another server has taken the port meanwhile, which happens with
    ``listen_when_ready`` alone.
    """
    app = create_app(engine, config, on_loopback=on_loopback(listeners))
    state: ServerState = app.state.server
    open_connections = OpenConnections(affordable_connections(config.max_connections))
    server = DrainingServer(
        uvicorn_config(app, config, open_connections, state.metrics.refused),
        state,
        open_connections,
        listeners,
        stopped,
    )
    state.num_connections = open_connections.__len__
    state.stop_server = server.stop
    if config.api_key_file is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, state.keys.reload)
    if not config.listen_when_ready:
        state.on_ready = lambda model: announce(model, config, listeners)
    await server.serve(listeners)
    if server.listen_error is not None:
        raise server.listen_error
    if state.unservable is not None:
        raise state.unservable
    if state.engine_lost is not None:
        logger.error("the server ended: %s", state.engine_lost)
    return 0 if state.load_error is None and state.engine_lost is None else 1
