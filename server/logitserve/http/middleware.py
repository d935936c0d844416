"""Around every request, outermost first: id and log line, draining, the API key, the size of the body."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from dataclasses import dataclass
from typing import Any, Self

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logitserve.config import ServerConfig
from logitserve.errors import ApiError, from_exception, not_ready
from logitserve.jobs.run import Counts
from logitserve.state import ServerState

access_logger = logging.getLogger("logitserve.access")

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Answered without a key and while draining. Decided on scope["path"], which no header can change."""

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
LONGEST_LOGGED_PATH = 200
LONGEST_LENGTH = 18


@dataclass(slots=True)
class LogFields:
    """What a route adds to its request's log line. Never a prompt or an answer."""

    request_id: str
    answer_id: str | None = None
    counts: Counts | None = None

    @classmethod
    def of(cls, scope: Scope) -> Self:
        fields: Self = scope["logitserve.log"]
        return fields


class RequestLog:
    """Gives each request an id, counts it as running, turns what nobody caught into a 500, and writes one line at the end."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        fields = scope["logitserve.log"] = LogFields(_request_id(scope))
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", fields.request_id.encode())]
            await send(message)

        started = time.perf_counter()
        if scope["path"] not in OPEN_PATHS:
            self._state.request_started()
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # noqa: BLE001 - the last stop: whatever was not foreseen is a 500 with an id
            response = from_exception(error).response()
            if status == 0:
                await response(scope, receive, send_with_id)
        finally:
            if scope["path"] not in OPEN_PATHS:
                self._state.request_ended()
            _log(scope, fields, status, time.perf_counter() - started)


def _request_id(scope: Scope) -> str:
    """The client's X-Request-Id if it is short and plain, else a fresh one."""
    value = _header(scope, b"x-request-id").decode("latin-1")
    return value if REQUEST_ID.fullmatch(value) else uuid.uuid4().hex


def _log(scope: Scope, fields: LogFields, status: int, seconds: float) -> None:
    line: dict[str, Any] = {
        "request_id": fields.request_id,
        "method": scope["method"],
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
    level = logging.DEBUG if scope["path"] in OPEN_PATHS else logging.INFO
    access_logger.log(level, "request", extra=line)


class DrainGate:
    """Turns requests away while the running ones end."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._state.draining and scope["path"] not in OPEN_PATHS:
            await not_ready("draining").response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


class KeyGate:
    """Asks for a bearer key everywhere but at the probes, where keys are configured."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._keys = [key.get_secret_value().encode() for key in config.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys or scope["path"] in OPEN_PATHS or self._admits(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "A valid API key is needed: send 'Authorization: Bearer KEY'.",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        scheme, _, given = _header(scope, b"authorization").partition(b" ")
        # Every key is compared, so that the time taken does not tell which one was near.
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


class BodyLimit:
    """Refuses bodies over ``max_body_bytes`` with 413, by their declared length or by count where none is declared."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._limit = config.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = _header(scope, b"content-length")
        if declared.isdigit() and (len(declared) > LONGEST_LENGTH or int(declared) > self._limit):
            await self._error().response()(scope, receive, send)
            return
        received = 0

        async def counting_receive() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._limit:
                    raise self._error()
            return message

        await self._app(scope, counting_receive, send)

    def _error(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self._limit} bytes.")


def _header(scope: Scope, name: bytes) -> bytes:
    value: bytes = next((value for key, value in scope["headers"] if key == name), b"")
    return value
