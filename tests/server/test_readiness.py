"""Answers of /ready, and the count of requests that run."""

from __future__ import annotations

import asyncio

import pytest
from logitengine.link.messages import GenerationRequest, StepOutput
from scripted_engine import OpenApp, Step
from starlette.websockets import WebSocket
from websocket_scope import connect

pytestmark = pytest.mark.anyio

BODY = {"prompt": "Hi", "max_tokens": 3}


def one_token(request: GenerationRequest) -> list[Step]:
    return [StepOutput(request_id=request.request_id, index=0, token_ids=[33], finish_reason="length")]


async def test_a_draining_server_is_not_ready_and_answers_whoever_has_connected(open_app: OpenApp) -> None:
    release = asyncio.Event()

    def script(request: GenerationRequest) -> list[Step]:
        return [release.wait(), *one_token(request)]

    async with open_app(script) as app:
        running = asyncio.create_task(app.post("/v1/completions", BODY))
        await app.engine.running(1)
        app.state.draining = True
        late = asyncio.create_task(app.post("/v1/completions", BODY))
        await app.engine.running(2)
        ready = await app.client.get("/ready")
        assert ready.status_code == 503
        assert "draining" in ready.json()["error"]["message"]
        assert (await app.client.get("/health")).status_code == 200
        assert not app.state.idle.is_set()
        release.set()
        assert [(await answer).status_code for answer in (running, late)] == [200, 200]
        assert app.state.idle.is_set()


async def test_an_open_websocket_is_a_request_that_runs(open_app: OpenApp) -> None:
    accepted, release = asyncio.Event(), asyncio.Event()

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        accepted.set()
        await release.wait()
        await websocket.close()

    async with open_app() as app:
        app.asgi.add_api_websocket_route("/talk", talk)
        running = asyncio.create_task(connect(app.asgi, "/talk", {}))
        await accepted.wait()
        assert not app.state.idle.is_set()
        release.set()
        assert [message["type"] for message in await running] == ["websocket.accept", "websocket.close"]
        assert app.state.idle.is_set()


async def test_readiness_gives_the_engines_reason(open_app: OpenApp) -> None:
    async with open_app() as app:
        app.engine.reason = "the engine process does not answer; it has been silent for 11 s"
        answer = await app.client.get("/ready")
    assert answer.status_code == 503
    assert "silent" in answer.json()["error"]["message"]
