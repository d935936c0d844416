"""A line in the log for every request, and the id that it is found by."""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass
from typing import Any, Protocol, Self

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logitserve.errors import from_exception
from logitserve.http.scope import OPEN_PATHS, header
from logitserve.state import ServerState

access_logger = logging.getLogger("logitserve.access")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
LONGEST_LOGGED_PATH = 200


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
    """What a route adds to its request's log line. Never a prompt or an answer."""

    request_id: str
    answer_id: str | None = None
    counts: TokenCounts | None = None

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
    value = header(scope, b"x-request-id").decode("latin-1")
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
