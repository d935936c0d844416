"""HTTP/1 on one connection: uvicorn's httptools protocol, with bounds and timeouts, and refusals that say why."""

from __future__ import annotations

import asyncio
import enum
import logging
import urllib.parse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from logitserve.config import ServerConfig
from logitserve.errors import ApiError, BadRequestError
from logitserve.http.connection import EXTENSION, Connection
from logitserve.http.http1.exchange import Exchange, Http10Exchange
from logitserve.http.http1.open_connections import OpenConnections
from logitserve.http.http1.read_timer import ReadTimer
from logitserve.http.http1.request_head import HeadMeter, check_head, split_target
from logitserve.http.refusal import raw_response

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application
    from uvicorn.config import Config
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
    from uvicorn.server import ServerState

logger = logging.getLogger(__name__)

MOST_PIPELINED = 32
"""Most requests that a client may send ahead of their answers."""

MOST_READ_AHEAD = 4
"""Requests sent ahead of their answers at which reading pauses.

While it reads, the server notices a lost connection.
"""

LINGER_SECONDS = 2.0
MOST_DROPPED_BYTES = 16 << 20
"""Bounds on reading from a refused client.

A socket closed with data unread would reset it before it reads the refusal.
"""

NEWCOMER_SECONDS = 2.0
"""Time that a connection has, from its start, for its first request when the server ends.

A newcomer may come from the backlog.
"""


class Stage(enum.Enum):
    """The received part of the latest request on a connection."""

    NOTHING = enum.auto()  # no request yet
    HEAD = enum.auto()
    BODY = enum.auto()
    ALL = enum.auto()


class HttpProtocol(HttpToolsProtocol):
    """One client's connection.

    It differs from uvicorn's: heads are bounded, and both heads and bodies must come in time. An offer of
    another protocol (h2c) is declined without loss of the body. An HTTP/1.0 client gets no chunks. Refusals
    are OpenAI's error objects, and come after the answers to earlier requests.
    """

    _connection: Connection

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        options: ServerConfig,
        open_connections: OpenConnections,
        refused: Callable[[ApiError], None],
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._options = options
        self._open_connections = open_connections
        self._refused = refused
        self._started_at = self.loop.time()
        self._stage = Stage.NOTHING
        self._num_requests = 0
        self._head = HeadMeter(options)
        self._running: RequestResponseCycle | None = None
        self._timer = ReadTimer(self.loop, options, self._fail, lambda: self.flow.read_paused)
        self._timed = (Stage.NOTHING, 0)
        self._refusal: ApiError | None = None
        self._is_deaf = False
        self._num_dropped = 0

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._connection = Connection(transport)
        if not self._open_connections.add(self):
            self._is_deaf = True
            error = _too_many_connections(self._options.max_connections)
            self._refused(error)
            transport.write(raw_response(error))
            transport.close()
            return
        self._timer.call_later(self._options.head_timeout, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.stop()
        self._open_connections.remove(self)
        self._connection.release()
        # uvicorn notifies the newest exchange. Those between the two never start.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def drop(self) -> None:
        """Implement `Member.drop`."""
        self.transport.abort()

    def drain(self) -> None:
        """Implement `Member.drain`. The last of several pipelined answers announces the end."""
        if self.cycle is not None and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def end(self) -> None:
        """Implement `Member.end`. A request that has begun to come, or waits in the kernel, is answered first."""
        age = self.loop.time() - self._started_at
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        elif self._stage is Stage.NOTHING and age < NEWCOMER_SECONDS:
            self.loop.call_later(NEWCOMER_SECONDS - age, self.end)
        elif self._stage is not Stage.HEAD and self._connection.num_unread_bytes() == 0:
            self.transport.close()

    # What the client sends

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            self._drop(data)
            return
        self._head.fed(len(data))
        self._feed(data)
        if self._is_deaf:
            return
        if self._stage in (Stage.HEAD, Stage.BODY):
            try:
                self._head.check_untold()
            except ApiError as fault:
                self._fail(fault)
                return
        self._time_the_client()

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if self._should_upgrade():
                    self.handle_websocket_upgrade()
                    return
                # The parser takes the following bytes for another protocol. A fresh one reads on, and never
                # sees the offer.
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            except httptools.HttpParserError as error:
                self._fail(_fault(error))
                return
            else:
                return

    def _head_without_upgrade(self) -> bytes:
        line = b"%s %s HTTP/%s" % (
            self.scope["method"].encode(),
            self.url,
            self.scope["http_version"].encode(),
        )
        headers = [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([line, *headers, b"", b""])

    # The parser's callbacks. An ApiError that they raise is the request's refusal.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        extensions: dict[str, Any] = {EXTENSION: self._connection}
        self.scope["extensions"] = extensions
        if self._stage is Stage.NOTHING:
            self._open_connections.spoke(self)
        self._unset_keepalive_if_required()
        self._stage = Stage.HEAD
        self._num_requests += 1
        self._head.begin()

    def on_url(self, url: bytes) -> None:
        self._head.count_target(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head.count_header(len(name) + len(value))
        # A trailer comes after the body. As a header it would evade the checks of the head, which are over.
        if self._stage is Stage.HEAD:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        version = self.parser.get_http_version()
        method = self.parser.get_method().decode("ascii")
        self.scope["method"], self.scope["http_version"] = method, version
        check_head(method, version, self.headers)
        if self.parser.should_upgrade():
            return
        path, query = split_target(self.url, self.headers)
        self.scope["raw_path"] = self.root_path.encode("ascii") + path
        self.scope["path"] = self.root_path + urllib.parse.unquote(path.decode("ascii"))
        self.scope["query_string"] = query
        if len(self.pipeline) >= MOST_PIPELINED:
            raise BadRequestError(f"More than {MOST_PIPELINED} requests were sent ahead of their answers.")
        is_current = self.cycle is None or self.cycle.response_complete
        self.cycle = self._exchange(version)
        self._stage = Stage.BODY
        if is_current:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.pipeline.appendleft((self.cycle, self.app))
            if len(self.pipeline) >= MOST_READ_AHEAD:
                self._pause_reading()

    def _exchange(self, version: str) -> Exchange:
        is_1_1 = version == "1.1"
        kind = Exchange if is_1_1 else Http10Exchange
        return kind(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue and is_1_1,
            keep_alive=is_1_1 and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if self._open_connections.is_draining and not self.pipeline:
            cycle.keep_alive = False
        self._running = cycle
        self._connection.limit_unsent(None)
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        self._head.told()
        self._timer.count_body(len(body))
        if self.cycle.response_complete:
            return
        self.cycle.body += body
        if len(self.cycle.body) > HIGH_WATER_LIMIT:
            self._pause_reading()
        self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._stage = Stage.ALL
        super().on_message_complete()

    def _pause_reading(self) -> None:
        self.flow.pause_reading()
        self._timer.paused()

    # Refusals

    def _fail(self, fault: ApiError) -> None:
        """Stop reading.

        A request whose head has come gets the fault from its body; otherwise the fault is the answer.
        """
        self._is_deaf = True
        self._timer.stop()
        if self._stage is not Stage.BODY:
            self._refusal = fault
            if self.cycle is None or self.cycle.response_complete:
                self._refuse(fault)
        elif isinstance(self.cycle, Exchange) and not self.cycle.response_complete:
            self.cycle.fail(fault)
        else:
            self.transport.close()

    def _refuse(self, fault: ApiError) -> None:
        self._unset_keepalive_if_required()
        logger.info(
            "refused unread: %s",
            fault.message,
            extra={"status": fault.status, "client": self.client and self.client[0]},
        )
        self._refused(fault)
        self.transport.write(raw_response(fault, self.server_state.default_headers))
        self.transport.write_eof()
        # No timeout covers this client, and closing would wait for it to read.
        self._timer.call_later(LINGER_SECONDS, self.transport.abort)

    def _drop(self, data: bytes) -> None:
        self._num_dropped += len(data)
        if self._num_dropped > MOST_DROPPED_BYTES:
            self.transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing() or not self.cycle.response_complete:
            return
        if self._refusal is not None:
            self._refuse(self._refusal)
        elif self._stage is not Stage.ALL:  # the next request has begun, or this one's body goes on
            self._unset_keepalive_if_required()

    def _time_the_client(self) -> None:
        """Set the timer of the next head or body, once for each. Most come whole and need none."""
        timed = (self._stage, self._num_requests)
        if timed == self._timed or self.transport.is_closing():
            return
        self._timed = timed
        self._timer.stop()
        match self._stage:
            case Stage.HEAD:
                self._timer.expect_head()
            case Stage.BODY:
                self._timer.expect_body()
            case Stage.ALL if self.cycle.response_complete:  # answered before its body ended
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )


def _fault(error: httptools.HttpParserError) -> ApiError:
    """Return the error that a callback raised, or the parser's own complaint."""
    match error.__context__:
        case ApiError() as fault:
            return fault
        case None:
            return BadRequestError(f"The request is not valid HTTP/1.1: {error}.", code="invalid_http")
        case unforeseen:
            logger.error("unforeseen error in a request's head", exc_info=unforeseen)
            return ApiError(500, "Internal server error.")


def _too_many_connections(limit: int) -> ApiError:
    return ApiError(
        503,
        f"The server has as many connections as it takes, at most {limit} (--max-connections).",
        code="too_many_connections",
        headers={"Retry-After": "1"},
    )
