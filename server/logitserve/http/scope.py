"""Questions that the middlewares ask of an ASGI scope."""

from __future__ import annotations

from starlette.types import Scope

PROBES = frozenset({"/health", "/ready"})


def is_request(scope: Scope) -> bool:
    """Return whether the scope is a client's: an HTTP request or a WebSocket, not the app's lifespan."""
    return scope["type"] in ("http", "websocket")


def is_probe(scope: Scope) -> bool:
    """Return whether the request passes without a key. No header can change the path."""
    return scope["type"] == "http" and scope["path"] in PROBES


def header(scope: Scope, name: bytes) -> bytes:
    """Return the first header of this name (in lower case), or nothing."""
    value: bytes = next((value for key, value in scope["headers"] if key == name), b"")
    return value
