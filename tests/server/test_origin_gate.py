"""Web pages and host names that may call the server, and others."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from logitengine.link.messages import GenerationRequest, StepOutput
from scripted_engine import App, OpenApp, Step
from starlette.types import Message
from starlette.websockets import WebSocket
from websocket_scope import connect

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "Hi", "max_tokens": 3}
EVIL = "https://evil.example"
APP = "https://app.example"


def one_token(request: GenerationRequest) -> list[Step]:
    return [StepOutput(request_id=request.request_id, index=0, token_ids=[33], finish_reason="length")]


async def status(app: App, **headers: str) -> int:
    return (await app.post(COMPLETIONS, BODY, headers=headers)).status_code


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        (EVIL, "127.0.0.1:8000"),
        (EVIL, "evil.example"),  # a name that was made to point here
        ("null", "127.0.0.1:8000"),
        ("null", "null"),
        ("", "127.0.0.1:8000"),
        ("http://127.0.0.1:8000", "127.0.0.1:8001"),
        ("http://localhost:8000", "127.0.0.1:8000"),
        ("http://localhost", "localhost:8000"),
        ("http://localhost:443", "localhost"),
        ("https://localhost", "localhost:80"),
        ("http://127.0.0.1:8000/", "127.0.0.1:8000"),
        ("http://me@127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://127.0.0.1:8000, http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://127.0.0.1.evil.example", "127.0.0.1.evil.example"),
        ("http://localhost.evil.example", "localhost.evil.example"),
        ("http://[::1]:8000", "[::2]:8000"),
        ("chrome-extension://localhost", "localhost"),
        ("file://", "localhost"),
        ("127.0.0.1:8000", "127.0.0.1:8000"),
    ],
)
async def test_a_page_of_another_origin_is_refused_by_name(open_app: OpenApp, origin: str, host: str) -> None:
    async with open_app(one_token) as app:
        answer = await app.post(COMPLETIONS, BODY, headers={"origin": origin, "host": host})
        assert app.engine.requests == []
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (403, "foreign_origin")
    assert f"--cors-origin {origin}" in error["message"]
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["vary"] == "Origin"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("https://127.0.0.1:8000", "127.0.0.1:8000"),  # a proxy ends TLS
        ("http://192.168.7.7", "192.168.7.7"),
        ("http://192.168.7.7", "192.168.7.7:80"),
        ("https://localhost", "localhost:443"),
        ("http://localhost:8000", "LOCALHOST:8000"),
        ("http://[::1]:8000", "[0:0:0:0:0:0:0:1]:8000"),
        ("https://api.example", "api.example"),
        ("https://api.example", "api.example."),
    ],
)
@pytest.mark.parametrize("on_loopback", [True, False], ids=["loopback", "everywhere"])
async def test_our_own_pages_may_call(open_app: OpenApp, origin: str, host: str, on_loopback: bool) -> None:
    async with open_app(one_token, on_loopback=on_loopback, allowed_host=["API.example"]) as app:
        assert await status(app, origin=origin, host=host) == 200


@pytest.mark.parametrize(
    ("listed", "origin"),
    [
        (APP, APP),
        (APP, "https://app.example:443"),
        ("https://App.Example:443", APP),
        ("http://localhost:5173", "http://localhost:5173"),
        ("app://-", "app://-"),
        ("app://*", "app://obsidian.md"),
        ("chrome-extension://*", "chrome-extension://bpoadfkcbjbfhfodiogcnhhhpibjhbnh"),
        ("moz-extension://0f1e-2d3c", "moz-extension://0f1e-2d3c"),
        ("file://", "file://"),
        ("null", "null"),
        ("*", EVIL),
        ("*", "null"),
        (f"{EVIL},{APP}", APP),
    ],
)
async def test_pages_of_the_listed_origins_may_call_whatever_the_host(
    open_app: OpenApp, listed: str, origin: str
) -> None:
    async with open_app(one_token, cors_origin=listed, on_loopback=True) as app:
        answer = await app.post(COMPLETIONS, BODY, headers={"origin": origin, "host": "name.example"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert "retry-after" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize(
    ("listed", "origin"),
    [
        (APP, "http://app.example"),
        (APP, "https://app.example:8443"),
        (APP, "https://app.example.evil.example"),
        (APP, "https://evilapp.example"),
        (APP, "null"),
        ("app://*", "https://app"),
        ("app://*", "app2://x"),
        ("chrome-extension://*", "null"),
    ],
)
async def test_a_listed_origin_admits_no_other(open_app: OpenApp, listed: str, origin: str) -> None:
    async with open_app(one_token, cors_origin=listed) as app:
        assert await status(app, origin=origin, host="127.0.0.1") == 403


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example:8000", 421),
        ("2130706433", 421),
        ("name.example:9", 200),
        ("localhost", 200),
        ("localhost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("10.1.2.3", 200),
        ("[::1]:8000", 200),
    ],
)
async def test_without_an_origin_a_server_on_loopback_goes_by_known_names_alone(
    open_app: OpenApp, host: str, expected: int
) -> None:
    async with open_app(one_token, on_loopback=True, allowed_host=["name.example"]) as app:
        answer = await app.post(COMPLETIONS, BODY, headers={"host": host})
        assert answer.status_code == expected
        for probe in ("/health", "/ready"):
            assert (await app.client.get(probe, headers={"host": host})).status_code == 200
        near = await app.client.get("/health/", headers={"host": host})
        assert near.status_code == (421 if expected == 421 else 404)
    if expected == 421:
        error = answer.json()["error"]
        assert error["code"] == "foreign_host"
        assert f"--allowed-host {host.partition(':')[0]}" in error["message"]


async def test_without_an_origin_a_server_that_others_reach_goes_by_every_name(open_app: OpenApp) -> None:
    async with open_app(one_token) as app:
        assert await status(app, host="logitserve.default.svc.cluster.local") == 200


async def test_any_host_may_be_allowed(open_app: OpenApp) -> None:
    async with open_app(one_token, on_loopback=True, allowed_host=["*"]) as app:
        assert await status(app, host="evil.example") == 200
        assert await status(app, host="evil.example", origin="http://evil.example") == 200
        assert await status(app, host="other.example", origin="http://evil.example") == 403


async def test_only_an_older_client_may_leave_the_host_out(open_app: OpenApp) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async with open_app(on_loopback=True) as app:
        for version, named, expected in [
            ("1.0", [], 200),
            ("1.0", [(b"host", b"evil.example")], 421),
            ("1.1", [], 400),
            ("1.1", [(b"host", b"")], 400),
            ("1.1", [(b"host", b"localhost"), (b"host", b"localhost")], 400),
            ("1.1", [(b"host", b"/health")], 400),
            ("1.1", [(b"host", b"[evil]")], 400),
            ("1.1", [(b"host", b"localhost"), (b"origin", b"null"), (b"origin", b"http://localhost")], 400),
            ("1.0", [(b"origin", b"http://localhost")], 403),
        ]:
            sent.clear()
            await app.asgi_post("/version", None, send, headers=named, http_version=version)
            assert sent[0]["status"] == expected, (version, named)
            if expected != 200:
                assert orjson.loads(sent[1]["body"])["error"]["message"]


async def preflight(app: App, origin: str, **headers: str) -> tuple[int, dict[str, str]]:
    asked = {"origin": origin, "access-control-request-method": "POST"}
    asked |= {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await app.client.options(COMPLETIONS, headers=asked)
    assert answer.status_code != 204 or not answer.content
    return answer.status_code, dict(answer.headers)


async def test_a_preflight_of_a_listed_origin_is_answered_without_a_key(open_app: OpenApp) -> None:
    async with open_app(api_key=["right"], cors_origin=[APP]) as app:
        status_code, headers = await preflight(
            app, APP, access_control_request_headers="authorization,content-type,x-stainless-os"
        )
        assert status_code == 204
        assert headers["access-control-allow-origin"] == APP
        assert "POST" in headers["access-control-allow-methods"]
        assert headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"
        assert int(headers["access-control-max-age"]) > 0
        assert "Origin" in headers["vary"]
        assert "access-control-allow-private-network" not in headers
        assert headers["x-request-id"]
        _, plain = await preflight(app, APP, access_control_request_private_network="true")
        assert {"authorization", "content-type", "x-api-key"} <= set(
            plain["access-control-allow-headers"].split(", ")
        )
        assert plain["access-control-allow-private-network"] == "true"


async def test_a_preflight_of_another_origin_gets_no_headers(open_app: OpenApp) -> None:
    async with open_app(cors_origin=[APP]) as app:
        status_code, headers = await preflight(app, EVIL)
        assert status_code == 403
        assert not any(name.startswith("access-control") for name in headers)
        # Without a preflight's headers it is a request like any other.
        assert (await app.client.options(COMPLETIONS, headers={"origin": APP})).status_code == 405
        assert (await app.client.options(COMPLETIONS)).status_code == 405


async def test_a_listed_origin_may_read_every_answer(open_app: OpenApp) -> None:
    """Streams, refusals by routes and by gates, and an unforeseen fault."""

    def script(request: GenerationRequest) -> list[Step]:
        if request.sampling.max_tokens == 7:
            raise ZeroDivisionError
        return one_token(request)

    async with open_app(script, api_key=["right"], cors_origin=[APP], max_body_bytes=1000) as app:
        key = {"authorization": "Bearer right"}
        asked: list[tuple[int, str, dict[str, Any], dict[str, str]]] = [
            (200, COMPLETIONS, {**BODY, "stream": True}, key),
            (401, COMPLETIONS, BODY, {}),
            (400, COMPLETIONS, {"nonsense": 1}, key),
            (404, "/nope", BODY, key),
            (413, COMPLETIONS, {"prompt": "x" * 2000}, key),
            (415, COMPLETIONS, BODY, {**key, "content-type": "text/plain"}),
            (500, COMPLETIONS, {**BODY, "max_tokens": 7}, key),
        ]
        for expected, path, body, headers in asked:
            answer = await app.post(path, body, headers={"origin": APP, **headers})
            assert answer.status_code == expected, answer.text
            assert answer.headers["access-control-allow-origin"] == APP
            assert "Origin" in answer.headers["vary"]


async def test_answers_vary_by_origin_for_those_who_sent_none(open_app: OpenApp) -> None:
    async with open_app(cors_origin=[APP]) as app:
        answer = await app.client.get("/version")
        assert answer.headers["vary"] == "Origin"
        assert "access-control-allow-origin" not in answer.headers
    async with open_app() as app:
        assert "vary" not in (await app.client.get("/version")).headers


async def test_a_foreign_page_gets_no_websocket(open_app: OpenApp) -> None:
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    async with open_app(on_loopback=True) as app:
        app.asgi.add_api_websocket_route("/talk", talk)
        (closed,) = await connect(app.asgi, "/talk", {"host": "localhost", "origin": EVIL})
        assert (closed["type"], closed["code"]) == ("websocket.close", 1008)
        start, *_ = await connect(app.asgi, "/talk", {"host": "evil.example"}, http_response=True)
        assert start["status"] == 421
        accepted, _ = await connect(app.asgi, "/talk", {"host": "localhost", "origin": "http://localhost"})
        assert accepted["type"] == "websocket.accept"
