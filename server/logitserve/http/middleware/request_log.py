"""A line in the log for every request, with an id to find it by."""

from __future__ import annotations

import ipaddress
import logging
import re
import time
import uuid
from dataclasses import dataclass
from typing import Any, Protocol, Self

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logitserve.errors import from_exception
from logitserve.http.refusal import INTERNAL_ERROR, refuse
from logitserve.http.scope import header, is_probe, is_request
from logitserve.state import ServerState

access_logger = logging.getLogger("logitserve.access")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
LONGEST_LOGGED_PATH = 200

SWITCHING_PROTOCOLS = 101
FORBIDDEN = 403


class TokenCounts(Protocol):
    """A request's tokens so far. They are read when it is over."""

    @property
    def prompt(self) -> int: ...

    @property
    def completion(self) -> int: ...

    @property
    def cached(self) -> int: ...


@dataclass(slots=True)
class LogFields:
    """Fields that a route adds to its request's log line. They never hold a prompt or an answer."""

    request_id: str
    answer_id: str | None = None
    counts: TokenCounts | None = None

    @classmethod
    def of(cls, scope: Scope) -> Self:
        fields: Self = scope["logitserve.log"]
        return fields


class RequestLog:
    """Gives each request an id, counts it as running and writes a line at its end.

    An uncaught exception is a 500.

    A WebSocket is one request, from its handshake until its app returns.
    """

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_request(scope):
            await self._app(scope, receive, send)
            return
        fields = scope["logitserve.log"] = LogFields(_request_id(scope))
        headers = scope["logitserve.reply_headers"] = [(b"x-request-id", fields.request_id.encode())]
        reply = _Reply(send, headers)
        started = time.perf_counter()
        if not is_probe(scope):
            self._state.request_started()
        try:
            await self._app(scope, receive, reply.send)
        except Exception as error:  # noqa: BLE001 - the last stop: whatever was not foreseen is a 500 with an id
            failure = from_exception(error)
            if reply.status == 0:
                await refuse(failure, scope, receive, reply.send)
            elif reply.is_open_websocket:
                await reply.send({"type": "websocket.close", "code": INTERNAL_ERROR})
        finally:
            if not is_probe(scope):
                self._state.request_ended()
            _log(scope, fields, reply.status, time.perf_counter() - started)


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


def _log(scope: Scope, fields: LogFields, status: int, seconds: float) -> None:
    line: dict[str, Any] = {
        "request_id": fields.request_id,
        "client": _client(scope),
        "method": scope.get("method", "GET"),  # a WebSocket's handshake is a GET
        "path": scope["path"][:LONGEST_LOGGED_PATH],
        "status": status,
        "duration_ms": round(seconds * 1000, 1),
    }
    if fields.answer_id is not None:
        line["answer_id"] = fields.answer_id
    if fields.counts is not None:
        line["prompt_tokens"] = fields.counts.prompt
        line["completion_tokens"] = fields.counts.completion
        line["cached_tokens"] = fields.counts.cached
    level = logging.DEBUG if is_probe(scope) else logging.INFO
    access_logger.log(level, "request", extra=line)
