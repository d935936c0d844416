"""What the middlewares read of a scope."""

from __future__ import annotations

from starlette.types import Scope

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Answered without a key and while draining. Decided on scope["path"], which no header can change."""


def header(scope: Scope, name: bytes) -> bytes:
    """The first header of this name (in lower case), or nothing."""
    value: bytes = next((value for key, value in scope["headers"] if key == name), b"")
    return value
