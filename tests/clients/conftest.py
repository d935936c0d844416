"""Servers for the client: one in this process, and one over HTTP, both with the tiny model."""

from __future__ import annotations

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
