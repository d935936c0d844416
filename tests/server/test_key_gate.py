"""The API key, which every path but the probes needs."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Any

import orjson
import pytest
from logitengine.link.messages import GenerationRequest, StepOutput
from scripted_engine import App, OpenApp, Step
from starlette.websockets import WebSocket
from websocket_scope import connect

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/version", "/tokenize", "/metrics", "/openapi.json", "/nope", "//health", "/health/"],
)
async def test_every_path_but_the_probes_needs_the_key(open_app: OpenApp, path: str) -> None:
    async with open_app(api_key=["right", "second"]) as app:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "right"},
            {"authorization": "Basic right"},
            {"x-api-key": "wrong"},
            {"x-api-key": "Bearer right"},
            {"x-api-key": ""},
            {"authorization": "Bearer "},
            {"authorization": "Bearer right,second"},
            {"cookie": "api_key=right", "x-forwarded-for": "127.0.0.1"},
        ):
            answer = await app.client.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for key in ("right", "second"):
            for headers in (
                {"authorization": f"Bearer {key}"},
                {"authorization": f"bearer  {key} "},
                {"x-api-key": key},
            ):
                answer = await app.client.get(path, headers=headers)
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


async def test_every_route_but_the_probes_needs_the_key(open_app: OpenApp) -> None:
    """Other servers left /tokenize, /pause and more open. Here every route but the probes is closed."""
    async with open_app(api_key=["right"]) as app:
        paths = set(app.asgi.openapi()["paths"])
        assert {"/tokenize", "/detokenize", "/v1/models", "/health", "/ready"} <= paths
        for path in paths | {"/openapi.json", "/metrics"}:
            for method in ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS"):
                status = (await app.client.request(method, path)).status_code
                assert (status == 401) == (path not in {"/health", "/ready"}), (method, path)


async def test_keys_are_compared_in_constant_time(open_app: OpenApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-59425: a comparison that ends at the first wrong byte shows how many were right.

    All digests have one length and are all compared: a right key first in the list ends nothing.
    """
    compared: list[tuple[Any, Any]] = []
    compare = hmac.compare_digest

    def watched(given: Any, key: Any) -> bool:
        compared.append((given, key))
        return compare(given, key)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    async with open_app(api_key=["right", "second", "third"]) as app:
        counts = []
        for key in ("right", "rigor", "x" * 1000, "third"):
            compared.clear()
            await app.client.get("/version", headers={"authorization": f"Bearer {key}"})
            counts.append(len(compared))
            assert len({len(side) for pair in compared for side in pair}) == 1
        assert counts == [6] * 4


async def test_one_right_key_is_enough(open_app: OpenApp) -> None:
    """A proxy may use the Authorization header for itself."""
    async with open_app(api_key=["right"]) as app:
        for headers in (
            {"authorization": "Basic dTpw", "x-api-key": "right"},
            {"authorization": "Bearer wrong", "x-api-key": "right"},
            {"authorization": "Bearer right", "x-api-key": "wrong"},
        ):
            assert (await app.client.get("/version", headers=headers)).status_code == 200


async def test_keys_from_a_file_are_read_again(
    open_app: OpenApp, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\nfirst\r\n  second  \n")

    async def admitted(app: App) -> list[str]:
        keys = ("first", "second", "third", "# ours", "")
        answers = [await app.client.get("/version", headers={"x-api-key": key}) for key in keys]
        return [key for key, answer in zip(keys, answers, strict=True) if answer.status_code == 200]

    async with open_app(api_key_file=path) as app:
        assert await admitted(app) == ["first", "second"]
        path.write_text("third\n")
        assert await admitted(app) == ["first", "second"]
        app.state.keys.reload()
        assert await admitted(app) == ["third"]
        for content in ("", "# none\n", "a secret\n", "secret,secret\n", "geheimnü\n", "x" * (2 << 20)):
            path.write_text(content)
            caplog.clear()
            app.state.keys.reload()
            (record,) = caplog.records
            assert record.levelname == "ERROR"
            assert str(path) in record.getMessage()
            assert await admitted(app) == ["third"]
        path.unlink()
        app.state.keys.reload()
        assert await admitted(app) == ["third"]
        assert "cannot be read" in caplog.text
    for secret in ("first", "second", "third", "secret", "geheim"):
        assert secret not in caplog.text


def one_token(request: GenerationRequest) -> list[Step]:
    return [StepOutput(request_id=request.request_id, index=0, token_ids=[33], finish_reason="length")]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/logits", {"input": "Hi"}),
        ("/v1/perplexity", {"input": "Hi"}),
        ("/v1/embeddings", {"input": "Hi"}),
        ("/pooling", {"input": "Hi"}),
    ],
)
async def test_each_key_has_cached_prefixes_of_its_own(
    open_app: OpenApp, path: str, body: dict[str, Any]
) -> None:
    """A prompt that is answered faster than computed came before. Only the same key may learn that."""

    async def salt_of(app: App, key: str, salt: str | None = None) -> str | None:
        asked = len(app.engine.requests)
        await app.post(path, body | {"cache_salt": salt}, headers={"authorization": f"Bearer {key}"})
        (request,) = app.engine.requests[asked:]
        return request.cache_salt

    async with open_app(one_token, api_key=["right", "second"]) as app:
        salts = [await salt_of(app, key, salt) for key in ("right", "second") for salt in (None, "a", "b")]
        assert len(set(salts)) == 6
        assert all(salts)
        assert await salt_of(app, "right", "a") == salts[1]
        first, second = salts[0], salts[3]
        assert first is not None
        assert second is not None
        # No salt that one key chooses makes another key's salt.
        assert await salt_of(app, "right", second) not in salts
        assert "right" not in "".join(filter(None, salts))
    async with open_app(one_token) as app:
        assert await salt_of(app, "right", None) is None
        assert await salt_of(app, "right", "a") == "a"
        assert await salt_of(app, "none", first) == first
