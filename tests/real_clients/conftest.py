"""One server of the default model for all clients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live_server import serving


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve with all defaults but the port, and yield the base URL."""
    with serving(tmp_path_factory.mktemp("server") / "server.log") as server:
        yield server.url
