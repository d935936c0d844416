"""Any ASGI app behind logitserve's HTTP protocol, on a real socket of this process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import uvicorn
from logitserve.config import ServerConfig
from logitserve.errors import ApiError
from logitserve.http.http1.open_connections import OpenConnections
from logitserve.http.uvicorn_server import uvicorn_config
from starlette.types import ASGIApp, Receive, Scope, Send
from uvloop import new_event_loop


@dataclass(frozen=True)
class ServedApp:
    """The server, in a thread."""

    url: str
    server: uvicorn.Server
    open_connections: OpenConnections


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the request's body.

    The answer's head has the request's path and the names of its headers.
    """
    body = b""
    more_body = True
    try:
        while more_body:
            message = await receive()
            body += message.get("body", b"")
            more_body = message.get("more_body", False)
    except ApiError as error:
        await error.response()(scope, receive, send)
        return
    headers = [
        (b"content-length", str(len(body)).encode()),
        (b"x-path", scope["path"].encode()),
        (b"x-names", b" ".join(name for name, _ in scope["headers"])),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def without_lifespan(app: ASGIApp) -> ASGIApp:
    async def only_requests(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await app(scope, receive, send)

    return only_requests


@contextlib.contextmanager
def served(app: ASGIApp = echo, **options: object) -> Iterator[ServedApp]:
    """Serve ``app`` with these options of ServerConfig."""
    config = ServerConfig.model_validate(options)
    open_connections = OpenConnections(config.max_connections)
    server = uvicorn.Server(uvicorn_config(without_lifespan(app), config, open_connections))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def run() -> None:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(server.serve([listener]))

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield ServedApp(url, server, open_connections)
        finally:
            server.should_exit = True
            thread.join()
