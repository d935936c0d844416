"""The API key, which every path but the probes needs."""

from __future__ import annotations

import orjson
import pytest
from scripted_engine import OpenApp
from starlette.websockets import WebSocket
from websocket_scope import connect

pytestmark = pytest.mark.anyio


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


async def test_a_key_outside_ascii_is_refused_and_breaks_nothing(open_app: OpenApp) -> None:
    async with open_app(api_key=["right"]) as app:
        answer = await app.client.get("/version", headers={b"authorization": "Bearer ключ".encode()})
    assert answer.status_code == 401


async def accept(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.close()


@pytest.mark.parametrize("path", ["/talk", "/health"])
async def test_a_websocket_without_the_key_is_closed_before_it_is_accepted(
    open_app: OpenApp, path: str
) -> None:
    async with open_app(api_key=["right"]) as app:
        app.asgi.add_api_websocket_route("/talk", accept)
        app.asgi.add_api_websocket_route("/health", accept)
        for headers in ({}, {"authorization": "Bearer wrong"}):
            (closed,) = await connect(app.asgi, path, headers)
            assert (closed["type"], closed["code"]) == ("websocket.close", 1008)
        admitted = await connect(app.asgi, path, {"authorization": "Bearer right"})
    assert [message["type"] for message in admitted] == ["websocket.accept", "websocket.close"]


async def test_a_websocket_without_the_key_gets_the_error_object_where_the_server_can_send_it(
    open_app: OpenApp,
) -> None:
    async with open_app(api_key=["right"]) as app:
        app.asgi.add_api_websocket_route("/talk", accept)
        start, body, *_ = await connect(app.asgi, "/talk", {}, http_response=True)
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 401)
    assert dict(start["headers"])[b"www-authenticate"] == b"Bearer"
    assert body["type"] == "websocket.http.response.body"
    assert orjson.loads(body["body"])["error"]["code"] == "invalid_api_key"
