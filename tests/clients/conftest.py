"""Servers for the client: an app in this process, and ``logitserve serve`` over HTTP, both with the tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from fastapi import FastAPI
from live_server import serving
from logitclient import AsyncClient
from logitengine.config import EngineConfig
from logitengine.link.client import EngineClient
from logitserve.config import ServerConfig
from logitserve.http.app import create_app
from safetensors.torch import save_file

START_SECONDS = 120
MODEL = "tiny"
KEY = "secret"
ENGINE = {"dtype": "float32", "kv_cache_bytes": 1 << 24, "num_threads": 1}


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def value_head() -> dict[str, torch.Tensor]:
    """A value head on the tiny model, in TRL's naming: [1, 64] and [1]."""
    generator = torch.Generator().manual_seed(1)
    return {
        "v_head.summary.weight": torch.randn(1, 64, generator=generator),
        "v_head.summary.bias": torch.randn(1, generator=generator),
    }


@pytest.fixture(scope="session")
async def app(
    tiny_llama: Path, value_head: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[FastAPI]:
    """The server's app with a real engine. The client itself waits until it is loaded: until then it answers 503."""
    head = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_file(value_head, head)
    config = EngineConfig.model_validate(
        {"model": str(tiny_llama), "value_head": {"helpful": str(head)}, **ENGINE}
    )
    server = ServerConfig.model_validate(
        {"served_model_name": [MODEL], "api_key": [KEY], "max_body_bytes": 1 << 16}
    )
    app = create_app(EngineClient(config), server)

    async def short_sleep(_seconds: float) -> None:
        await asyncio.sleep(0.05)

    async with app.router.lifespan_context(app):
        async with (
            asyncio.timeout(START_SECONDS),
            AsyncClient(
                transport=httpx.ASGITransport(app), api_key=KEY, max_retries=1 << 20, sleep=short_sleep
            ) as client,
        ):
            await client.models()
        yield app


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[AsyncClient]:
    """A client of ``app``, without sockets."""
    async with AsyncClient(transport=httpx.ASGITransport(app), api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def url(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server process, without a key."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
    with serving(log, str(tiny_llama), f"--served-model-name={MODEL}", *flags) as server:
        yield server.url
