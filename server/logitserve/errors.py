"""Errors as a client sees them: always OpenAI's error object.

ApiError                 any status, with the field at fault
└── BadRequestError      400
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from fastapi.responses import Response
from logitengine.errors import (
    EngineDeadError,
    EngineError,
    EngineNotReadyError,
    EngineOverloadedError,
    RequestFatalError,
    RequestRefusedError,
)
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from logitserve.telemetry.record import names_of, note_failure

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from pydantic import ValidationError

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = "1"
LONGEST_PATH = 100
CHOICE = "|"
"""First character of what pydantic puts into a path for the class that it chose of several: no member's name."""

STATUS_CODES = {
    401: "invalid_api_key",
    403: "foreign_origin",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_too_slow",
    413: "request_too_large",
    415: "unsupported_media_type",
    421: "foreign_host",
    429: "rate_limit_exceeded",
    431: "headers_too_large",
    500: "internal_error",
    501: "not_implemented",
    503: "service_unavailable",
    504: "timeout",
    505: "http_version_not_supported",
}
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error with the status and the object that a client will see."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code if code is not None else STATUS_CODES.get(status)
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        return TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """Return ``{"error": {"message", "type", "param", "code"}}``."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return _ErrorResponse(self)


class _ErrorResponse(Response):
    """The response of an error. The request's record learns of it when it is sent."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(
            orjson.dumps(error.body()),
            status_code=error.status,
            headers=error.headers,
            media_type="application/json",
        )
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note_failure(scope, self._error)
        await super().__call__(scope, receive, send)


class BadRequestError(ApiError):
    """An error in the request, 400; ``param`` names the field."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = "invalid_value") -> None:
        super().__init__(400, message, param=param, code=code)


def not_ready(reason: str) -> ApiError:
    return ApiError(
        503,
        f"The server takes no requests at the moment: {reason}.",
        code="not_ready",
        headers={"Retry-After": RETRY_AFTER_SECONDS},
    )


def from_engine(error: EngineError) -> ApiError:
    """Return the error for a client whose request the engine could not serve."""
    retry = {"Retry-After": RETRY_AFTER_SECONDS}
    match error:
        case RequestRefusedError():
            return BadRequestError(str(error), code="request_refused")
        case EngineOverloadedError():
            return ApiError(429, str(error) or "The queue is full.", code="engine_overloaded", headers=retry)
        case EngineNotReadyError():
            return not_ready(str(error) or "the engine is not ready")
        case RequestFatalError():
            # A 503 would be tried again, by clients and on other servers, until none has an engine.
            return ApiError(500, str(error), code="request_fatal", headers={"x-should-retry": "false"})
        case EngineDeadError():
            return ApiError(503, str(error) or "The engine died.", code="engine_dead", headers=retry)
        case _:
            return ApiError(500, "The engine failed.")


def from_exception(error: Exception, scope: Scope) -> ApiError:
    """Return the error for anything raised while the request of ``scope`` was served.

    Unforeseen faults are logged and not shown.
    """
    match error:
        case ApiError():
            return error
        case EngineError():
            return from_engine(error)
        case ClientDisconnect():
            return ApiError(400, "The client left before it had sent its request.", code="client_left")
        case _:
            logger.error("unforeseen error", exc_info=error, extra=names_of(scope))
            return ApiError(500, "Internal server error.")


def field_path(location: Sequence[int | str]) -> str:
    """Return ``("messages", 0, "content")`` as ``messages[0].content``. A path that a client made long is cut."""
    path = ""
    for part in location:
        if isinstance(part, str) and part.startswith(CHOICE):
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path if len(path) <= LONGEST_PATH else path[:LONGEST_PATH] + "..."


def from_validation(error: ValidationError) -> BadRequestError:
    """Return the first fault that pydantic found as an error that names its field by path."""
    fault = error.errors(include_url=False, include_input=False)[0]
    path = field_path(fault["loc"])
    match fault["type"]:
        case "extra_forbidden":
            return BadRequestError(f"Unknown field: '{path}'.", param=path, code="unknown_parameter")
        case "missing":
            return BadRequestError(f"Missing field: '{path}'.", param=path, code="missing_required_parameter")
        case "member":
            about = fault["ctx"]
            path = field_path((*fault["loc"], about["member"]))
            return BadRequestError(f"'{path}' {about['fault']}.", param=path, code=about["code"])
        case "value_error":
            message = fault["msg"].removeprefix("Value error, ")
            return BadRequestError(f"'{path}' {message}." if path else f"{message}.", param=path or None)
        case kind:
            code = "invalid_type" if kind.endswith("_type") else "invalid_value"
            return BadRequestError(f"'{path}' is invalid: {fault['msg']}.", param=path or None, code=code)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every foreseen error, the framework's own included, with OpenAI's error object."""

    async def on_http_error(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            return from_exception(error, request.scope).response()
        message = f"{error.detail}: {request.method} {request.scope['path'][:LONGEST_PATH]}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    async def on_error(request: Request, error: Exception) -> Response:
        return from_exception(error, request.scope).response()

    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ApiError, on_error)
    app.add_exception_handler(EngineError, on_error)
