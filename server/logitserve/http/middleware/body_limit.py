"""The limit on the size of a request's body."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logitserve.config import ServerConfig
from logitserve.errors import ApiError
from logitserve.http.scope import header

LONGEST_LENGTH = 18
"""Most digits of a declared length that are read as a number."""


class BodyLimit:
    """Refuses bodies over ``max_body_bytes`` with 413. A body without a declared length is counted as it comes."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._limit = config.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = header(scope, b"content-length")
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
        return ApiError(
            413,
            f"The body is larger than {self._limit} bytes (--max-body-bytes).",
            headers={"Connection": "close"},
        )
