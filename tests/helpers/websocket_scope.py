"""A WebSocket without a server: the messages of an app to a client that connects and stays silent."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message, Send


async def connect(
    app: ASGIApp,
    path: str,
    headers: dict[str, str],
    *,
    http_response: bool = False,
    send: Send | None = None,
) -> list[Message]:
    """Run the app until it returns, and return its messages, unless ``send`` took them.

    With ``http_response`` the server can answer a handshake with an HTTP response.
    """
    told: list[Message] = [{"type": "websocket.connect"}]
    sent: list[Message] = []

    async def receive() -> Message:
        if told:
            return told.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def keep(message: Message) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "websocket",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "ws",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in {"host": "test", **headers}.items()],
        "client": ("test", 1),
        "server": ("test", 80),
        "subprotocols": [],
        "extensions": {"websocket.http.response": {}} if http_response else {},
    }
    await app(scope, receive, send or keep)
    return sent
