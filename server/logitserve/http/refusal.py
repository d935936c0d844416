"""Refusals before any route sees the request, for HTTP and for a WebSocket that is not accepted yet."""

from __future__ import annotations

import http
from collections.abc import Iterable

import orjson
from starlette.types import Receive, Scope, Send

from logitserve.errors import ApiError
from logitserve.telemetry.record import note_failure

HTTP_RESPONSE = "websocket.http.response"
"""The ASGI extension by which a server lets a WebSocket's handshake be answered with an HTTP response."""

CLOSE_CODES = {400: 1008, 401: 1008, 403: 1008, 421: 1008, 503: 1013}
"""The close code of a refused WebSocket by its status: RFC 6455's "policy violation", IANA's "try again later"."""

INTERNAL_ERROR = 1011
"""RFC 6455's close code for a condition that the server did not foresee."""


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send ``error``'s response.

    A WebSocket whose server cannot send responses is closed before it is accepted.
    """
    if scope["type"] == "http" or HTTP_RESPONSE in scope.get("extensions", {}):
        await error.response()(scope, receive, send)
        return
    note_failure(scope, error)
    code = CLOSE_CODES.get(error.status, INTERNAL_ERROR)
    await send({"type": "websocket.close", "code": code, "reason": error.code or ""})


def raw_response(error: ApiError, headers: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """Return the bytes of ``error``'s response where there is no request to answer. The connection ends with it."""
    body = orjson.dumps(error.body())
    own = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers,
    }
    lines = [
        b"HTTP/1.1 %d %s" % (error.status, http.HTTPStatus(error.status).phrase.encode()),
        *(b"%s: %s" % header for header in headers),
        *(f"{name}: {value}".encode("latin-1") for name, value in own.items()),
    ]
    return b"\r\n".join([*lines, b"", body])
