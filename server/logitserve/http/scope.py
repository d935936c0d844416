"""What the middlewares read of a scope."""

from __future__ import annotations

from starlette.types import Scope

PROBES = frozenset({"/health", "/ready"})


def is_request(scope: Scope) -> bool:
    """Whether the scope is a client's: an HTTP request or a WebSocket, not the app's lifespan."""
    return scope["type"] in ("http", "websocket")


def is_probe(scope: Scope) -> bool:
    """Whether it is answered without a key and while draining. Decided on the path, which no header can change."""
    return scope["type"] == "http" and scope["path"] in PROBES


def header(scope: Scope, name: bytes) -> bytes:
    """The first header of this name (in lower case), or nothing."""
    value: bytes = next((value for key, value in scope["headers"] if key == name), b"")
    return value
