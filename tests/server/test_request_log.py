"""Request ids and log lines of HTTP requests and WebSockets."""

from __future__ import annotations

import asyncio
import logging

import pytest
from fastapi import Request
from logitengine.link.messages import GenerationRequest, StepOutput
from logitserve.telemetry.record import RequestRecord
from scripted_engine import OpenApp, Step
from starlette.types import Message, Scope
from starlette.websockets import WebSocket
from websocket_scope import connect

pytestmark = pytest.mark.anyio

BODY = {"prompt": "a secret prompt", "max_tokens": 3}


def one_token(request: GenerationRequest) -> list[Step]:
    return [StepOutput(request_id=request.request_id, index=0, token_ids=[33], finish_reason="length")]


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


async def test_a_websocket_has_an_id_and_a_log_line_and_is_closed_on_a_fault(
    open_app: OpenApp, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(websocket: WebSocket) -> None:
        await websocket.close()

    async def fail_early(_websocket: WebSocket) -> None:
        raise ZeroDivisionError

    async def fail_late(websocket: WebSocket) -> None:
        await websocket.accept()
        raise ZeroDivisionError

    sent: dict[str, list[Message]] = {}
    async with open_app() as app:
        for route in (refuse, fail_early, fail_late):
            name = route.__name__
            app.asgi.add_api_websocket_route(f"/{name}", route)
            with caplog.at_level(logging.INFO):
                sent[name] = await connect(app.asgi, f"/{name}", {"x-request-id": name}, http_response=True)
            assert app.state.idle.is_set()
    lines = {line["request_id"]: line for line in map(vars, caplog.records) if "request_id" in line}
    assert {name: (line["method"], line["path"], line["status"]) for name, line in lines.items()} == {
        "refuse": ("GET", "/refuse", 403),
        "fail_early": ("GET", "/fail_early", 500),
        "fail_late": ("GET", "/fail_late", 101),
    }
    assert dict(sent["fail_early"][0]["headers"])[b"x-request-id"] == b"fail_early"
    accepted, closed = sent["fail_late"]
    assert dict(accepted["headers"])[b"x-request-id"] == b"fail_late"
    assert (closed["type"], closed["code"]) == ("websocket.close", 1011)


async def test_a_client_that_leaves_while_it_sends_its_body_is_no_error_of_ours(
    open_app: OpenApp, caplog: pytest.LogCaptureFixture
) -> None:
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"host", b"test"), (b"content-type", b"application/json"), (b"x-request-id", b"leaver")],
    }
    told: list[Message] = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        return told.pop(0)

    async def send(_message: Message) -> None:
        pass

    async with open_app() as app:
        with caplog.at_level(logging.INFO):
            await app.asgi(scope, receive, send)
    (line,) = [vars(record) for record in caplog.records if getattr(record, "request_id", "") == "leaver"]
    assert line["status"] == 400
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    ("client", "told"),
    [
        (("192.0.2.7", 5), "192.0.2.7"),
        (("2001:DB8:0::7", 0), "2001:db8::7"),
        (("fe80::1%\x1b[2J evil=1", 0), "fe80::1"),
        (("\x1b[2J" * 20, 0), "unknown"),  # from a trusted proxy
        (None, None),
    ],
)
async def test_a_log_line_has_the_clients_address(
    open_app: OpenApp, caplog: pytest.LogCaptureFixture, client: tuple[str, int] | None, told: str | None
) -> None:
    async def send(_message: Message) -> None:
        pass

    with caplog.at_level(logging.INFO):
        async with open_app() as app:
            await app.asgi_post("/version", None, send, client=client)
    (line,) = [vars(record) for record in caplog.records if record.name == "logitserve.access"]
    assert line["client"] == told


@pytest.mark.parametrize(
    ("path", "key", "level"),
    [
        ("/metrics", "wrong", logging.INFO),
        ("/metrics", "right", logging.DEBUG),
        ("/ready", "wrong", logging.DEBUG),
        ("/version", "right", logging.INFO),
    ],
)
async def test_scrapes_are_told_only_where_they_fail_and_probes_never(
    open_app: OpenApp, caplog: pytest.LogCaptureFixture, path: str, key: str, level: int
) -> None:
    with caplog.at_level(logging.DEBUG):
        async with open_app(api_key=["right"]) as app:
            app.state.draining = path == "/ready"
            await app.client.get(path, headers={"authorization": f"Bearer {key}"})
    (line,) = [record for record in caplog.records if record.name == "logitserve.access"]
    assert line.levelno == level


@pytest.mark.parametrize(("draining", "ending"), [(True, "shutting_down"), (False, None)])
async def test_a_request_that_the_servers_end_cancels_has_failed_and_its_client_has_not_left(
    open_app: OpenApp, *, draining: bool, ending: str | None
) -> None:
    begun = asyncio.Event()
    scopes: list[Scope] = []

    async def wait(request: Request) -> None:
        scopes.append(request.scope)
        begun.set()
        await asyncio.Event().wait()

    async with open_app() as app:
        app.asgi.add_api_route("/wait", wait)
        asked = asyncio.create_task(app.client.get("/wait"))
        await begun.wait()
        app.state.draining = draining
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
    record = RequestRecord.of(scopes[0])
    assert (record.has_left, record.failure and record.failure.code) == (not draining, ending)
