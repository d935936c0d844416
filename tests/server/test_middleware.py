"""Keys, draining, request ids and log lines."""

from __future__ import annotations

import asyncio
import logging

import pytest
from logitengine.link.messages import GenerationRequest, StepOutput
from scripted_engine import OpenApp, Step

pytestmark = pytest.mark.anyio

BODY = {"prompt": "a secret prompt", "max_tokens": 3}


def one_token(request: GenerationRequest) -> list[Step]:
    return [StepOutput(request_id=request.request_id, index=0, token_ids=[33], finish_reason="length")]


@pytest.mark.parametrize(
    "path", ["/v1/models", "/version", "/tokenize", "/openapi.json", "/nope", "//health", "/health/"]
)
async def test_every_path_but_the_probes_needs_the_key(open_app: OpenApp, path: str) -> None:
    async with open_app(api_key=["right", "second"]) as app:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "right"},
            {"authorization": "Basic right"},
            {"host": "/health"},
        ):
            answer = await app.client.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for key in ("right", "second"):
            answer = await app.client.get(path, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code != 401
        assert (await app.client.get("/health")).status_code == 200
        assert (await app.client.get("/ready")).status_code == 200


async def test_a_key_in_other_letters_is_refused_and_breaks_nothing(open_app: OpenApp) -> None:
    async with open_app(api_key=["right"]) as app:
        answer = await app.client.get("/version", headers={b"authorization": "Bearer ключ".encode()})
    assert answer.status_code == 401


async def test_a_draining_server_ends_what_runs_and_takes_no_more(open_app: OpenApp) -> None:
    release = asyncio.Event()

    def script(request: GenerationRequest) -> list[Step]:
        return [release.wait(), *one_token(request)]

    async with open_app(script) as app:
        running = asyncio.create_task(app.post("/v1/completions", BODY))
        await app.engine.running(1)
        app.state.draining = True
        refused = await app.post("/v1/completions", BODY)
        ready = await app.client.get("/ready")
        assert (refused.status_code, ready.status_code) == (503, 503)
        assert "draining" in ready.json()["error"]["message"]
        assert (await app.client.get("/health")).status_code == 200
        assert not app.state.idle.is_set()
        release.set()
        assert (await running).status_code == 200
        assert app.state.idle.is_set()


async def test_readiness_gives_the_engines_reason(open_app: OpenApp) -> None:
    async with open_app() as app:
        app.engine.reason = "the engine process does not answer; it has been silent for 11 s"
        answer = await app.client.get("/ready")
    assert answer.status_code == 503
    assert "silent" in answer.json()["error"]["message"]


async def test_a_log_line_has_the_id_and_the_tokens_and_no_text(
    open_app: OpenApp, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        async with open_app(one_token) as app:
            answer = await app.post("/v1/completions", BODY, headers={"x-request-id": "my-id"})
    (record,) = [record for record in caplog.records if getattr(record, "request_id", None) == "my-id"]
    assert answer.headers["x-request-id"] == "my-id"
    line = vars(record)
    assert (line["path"], line["status"], line["completion_tokens"]) == ("/v1/completions", 200, 1)
    assert line["answer_id"] == answer.json()["id"]
    assert "secret" not in caplog.text


async def test_a_body_over_the_limit_is_refused_before_it_is_parsed(open_app: OpenApp) -> None:
    async with open_app(max_body_bytes=100) as app:
        answer = await app.post("/v1/completions", {"prompt": "x" * 200})
    assert answer.status_code == 413
