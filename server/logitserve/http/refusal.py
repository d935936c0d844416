"""Refusals of requests that no route has seen, for HTTP and for a WebSocket that is not accepted yet."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from logitserve.errors import ApiError

HTTP_RESPONSE = "websocket.http.response"
"""The ASGI extension by which a server lets a WebSocket's handshake be answered with an HTTP response."""

CLOSE_CODES = {400: 1008, 401: 1008, 403: 1008, 421: 1008, 503: 1013}
"""The close code of a refused WebSocket by its status: RFC 6455's "policy violation", IANA's "try again later"."""

INTERNAL_ERROR = 1011
"""RFC 6455's close code for a condition that the server did not foresee."""


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Send ``error``'s response. A WebSocket whose server cannot do that is closed before it is accepted."""
    if scope["type"] == "http" or HTTP_RESPONSE in scope.get("extensions", {}):
        await error.response()(scope, receive, send)
        return
    code = CLOSE_CODES.get(error.status, INTERNAL_ERROR)
    await send({"type": "websocket.close", "code": code, "reason": error.code or ""})
