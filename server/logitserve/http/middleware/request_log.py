"""A record of every request: it is counted at its end, and becomes a line in the log with an id to find it by."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logitserve.errors import ApiError, from_exception
from logitserve.http.refusal import INTERNAL_ERROR, refuse
from logitserve.http.scope import header, is_probe, is_request, is_watching
from logitserve.state import ServerState
from logitserve.telemetry.record import KEY, RequestRecord
from logitserve.telemetry.routes import RouteNames, method_name
from logitserve.telemetry.trace_context import trace_id_of

access_logger = logging.getLogger("logitserve.access")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
LONGEST_LOGGED_PATH = 200

SWITCHING_PROTOCOLS = 101
FAILURE = 400
FORBIDDEN = 403


class RequestLog:
    """Gives each request an id and a record, counts it as running, and tells of it at its end.

    An uncaught exception is a 500.

    A WebSocket is one request, from its handshake until its app returns.
    """

    def __init__(self, app: ASGIApp, state: ServerState, routes: RouteNames) -> None:
        self._app = app
        self._state = state
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_request(scope):
            await self._app(scope, receive, send)
            return
        is_work = not is_watching(scope)
        record = scope[KEY] = self._record(scope)
        tracing = self._state.tracing if is_work else None
        span = None if tracing is None else tracing.begin(record, scope)
        headers = scope["logitserve.reply_headers"] = [(b"x-request-id", record.request_id.encode())]
        reply = _Reply(send, headers)
        if is_work:
            self._state.request_started()
        try:
            await self._answer(scope, receive, reply)
        except asyncio.CancelledError:
            self._cancelled(record)
            raise
        finally:
            record.ended, record.status = time.monotonic(), reply.status
            if is_work:
                self._state.request_ended()
            self._state.metrics.ended(record)
            if tracing is not None and span is not None:
                tracing.end(span, record, self._state.model_name)
            is_told = is_work or (record.status >= FAILURE and not is_probe(scope))
            _log(scope, record, logging.INFO if is_told else logging.DEBUG)

    def _record(self, scope: Scope) -> RequestRecord:
        return RequestRecord(
            _request_id(scope),
            method=method_name(scope),
            route=self._routes.of(scope),
            trace_id=trace_id_of(header(scope, b"traceparent")),
        )

    def _cancelled(self, record: RequestRecord) -> None:
        """Note whether the server's end or the client's leave has cancelled a request."""
        if self._state.draining:
            record.failure = ApiError(
                503, "The server ended before the request was answered.", code="shutting_down"
            )
        else:
            record.has_left = True

    async def _answer(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        try:
            await self._app(scope, receive, reply.send)
        except Exception as error:  # noqa: BLE001 - the last stop: whatever was not foreseen is a 500 with an id
            failure = from_exception(error, scope)
            if reply.status == 0:
                await refuse(failure, scope, receive, reply.send)
                return
            RequestRecord.of(scope).failure = failure
            if reply.is_open_websocket:
                await reply.send({"type": "websocket.close", "code": INTERNAL_ERROR})


class _Reply:
    """Passes an answer on, adds the reply headers to its head and remembers its status."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._headers = headers
        self.status = 0
        """Zero until the answer begins. An accepted WebSocket has 101, a closed handshake the 403 that servers send."""
        self.is_open_websocket = False

    async def send(self, message: Message) -> None:
        match message["type"]:
            case "http.response.start" | "websocket.http.response.start":
                self.status = message["status"]
                self._add_headers(message)
            case "websocket.accept":
                self.status, self.is_open_websocket = SWITCHING_PROTOCOLS, True
                self._add_headers(message)
            case "websocket.close":
                self.status, self.is_open_websocket = self.status or FORBIDDEN, False
        await self._send(message)

    def _add_headers(self, message: Message) -> None:
        message["headers"] = [*message.get("headers", ()), *self._headers]


def _request_id(scope: Scope) -> str:
    """Return the client's X-Request-Id if it is short and plain, else a fresh one."""
    value = header(scope, b"x-request-id").decode("latin-1")
    return value if REQUEST_ID.fullmatch(value) else uuid.uuid4().hex


def _client(scope: Scope) -> str | None:
    """Return the client's address, or "unknown" where a trusted proxy gave none. A Unix socket's clients have none."""
    client = scope.get("client")
    if not client:
        return None
    try:
        # The scope of an IPv6 address may be any text.
        return str(ipaddress.ip_address(client[0])).partition("%")[0]
    except ValueError:
        return "unknown"


def _log(scope: Scope, record: RequestRecord, level: int) -> None:
    line: dict[str, Any] = {
        **record.names(),
        "client": _client(scope),
        "method": scope.get("method", "GET"),  # a WebSocket's handshake is a GET
        "path": scope["path"][:LONGEST_LOGGED_PATH],
        "status": record.status,
        "duration_ms": round(record.seconds * 1000, 1),
    }
    if record.answer_id is not None:
        line["answer_id"] = record.answer_id
    if record.counts is not None:
        line["prompt_tokens"] = record.counts.prompt
        line["completion_tokens"] = record.counts.completion
        line["cached_tokens"] = record.counts.cached
    access_logger.log(level, "request", extra=line)
