"""The server that `logitserve extract` starts, whose port nobody else can take to read the prompts."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from logitengine.config import EngineConfig
from logitserve.extract.local_server import local_server


def squat(port: int) -> None:
    """Listen on a port, as a stranger would to read other people's requests."""
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", port))
        squatter.listen()


class NotStartedError(Exception):
    """Error raised in place of a start."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_the_port_is_taken_before_the_child_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def start(*_arguments: str, env: dict[str, str], pass_fds: list[int], **_others: Any) -> None:
        (descriptor,) = pass_fds
        assert env["LOGITSERVE_FD"] == str(descriptor)
        with socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as listener:
            address, port = listener.getsockname()
        assert address == "127.0.0.1"
        with pytest.raises(OSError, match="in use"):
            squat(port)
        raise NotStartedError

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    with pytest.raises(NotStartedError):
        async with local_server(EngineConfig(), tmp_path / "log"):
            pass


@pytest.mark.anyio
async def test_the_port_stays_taken_when_the_child_ends(tiny_llama: Path, tmp_path: Path) -> None:
    config = EngineConfig(model=str(tiny_llama), dtype="float32", num_threads=1, kv_cache_bytes=1 << 24)
    async with local_server(config, tmp_path / "log") as server:
        port = urlsplit(server.url).port
        assert port is not None
        async with httpx.AsyncClient(base_url=server.url) as client:
            assert (await client.get("/v1/models")).status_code == 401
            key = {"authorization": f"Bearer {server.api_key}"}
            assert (await client.get("/v1/models", headers=key)).status_code == 200
        server.process.kill()
        await server.process.wait()
        with pytest.raises(OSError, match="in use"):
            squat(port)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port)).close()
