"""Questions that the middlewares ask of an ASGI scope."""

from __future__ import annotations

from starlette._utils import get_route_path
from starlette.types import Scope

PROBES = frozenset({"/health", "/ready"})
METRICS = "/metrics"


def is_request(scope: Scope) -> bool:
    """Return whether the scope is a client's: an HTTP request or a WebSocket, and not the app's lifespan."""
    return scope["type"] in ("http", "websocket")


def is_probe(scope: Scope) -> bool:
    """Return whether the request passes without a key. No header can change the path.

    The path is the one that routes are matched by, the root path taken off by the same function.
    """
    return scope["type"] == "http" and get_route_path(scope) in PROBES


def is_watching(scope: Scope) -> bool:
    """Return whether the request is a probe or asks for the metrics, and so is none of the server's work."""
    return is_probe(scope) or (scope["type"] == "http" and get_route_path(scope) == METRICS)


def header(scope: Scope, name: bytes) -> bytes:
    """Return the first header of this name (in lower case), or nothing."""
    value: bytes = next((value for key, value in scope["headers"] if key == name), b"")
    return value


def headers(scope: Scope, name: bytes) -> list[bytes]:
    """Return every header of this name (in lower case)."""
    return [value for key, value in scope["headers"] if key == name]


def reply_headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    """Return the headers that are added to the answer's head. A middleware may add to the list."""
    added: list[tuple[bytes, bytes]] = scope["logitserve.reply_headers"]
    return added
