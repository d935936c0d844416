"""A real server with the default model, started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live_server import serving


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of ``logitserve serve`` with all defaults but the port."""
    with serving(tmp_path_factory.mktemp("server") / "server.log") as server:
        yield server.url
