"""How the server ends."""

from __future__ import annotations

import asyncio

import pytest
from logitengine.link.messages import ModelInfo
from logitserve.config import ServerConfig
from logitserve.http.listener import bind
from logitserve.http.uvicorn_server import run_app
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio


async def test_a_lost_engine_ends_the_server_with_1_and_its_last_line_says_why(
    model_info: ModelInfo, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ScriptedEngine(model_info, lambda _: [])
    config = ServerConfig(port=0)
    running = asyncio.create_task(run_app(engine, config, bind(config), asyncio.Event()))
    engine.lost.set()
    assert await running == 1
    assert caplog.records[-1].levelname == "ERROR"
    assert caplog.records[-1].message == "the server ended: the engine died too often"
