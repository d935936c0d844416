"""Compressed bodies: decoded, refused, and inflated within the limit."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from logitengine.link.messages import GenerationRequest, StepOutput
from logitserve.config import ServerConfig
from logitserve.errors import ApiError
from logitserve.http.middleware.content_encoding import ContentEncoding
from scripted_engine import OpenApp, Step
from starlette.types import Message, Receive, Scope, Send

pytestmark = pytest.mark.anyio

BODY = json.dumps({"prompt": "Hi", "max_tokens": 1}).encode()
LIMIT = 1 << 20


def one_token(request: GenerationRequest) -> list[Step]:
    return [StepOutput(request_id=request.request_id, index=0, token_ids=[33], finish_reason="length")]


@pytest.mark.parametrize(
    ("encoding", "content"),
    [
        ("gzip", gzip.compress(BODY)),
        ("GZIP", gzip.compress(BODY)),
        ("x-gzip", gzip.compress(BODY)),
        ("gzip", gzip.compress(BODY[:9]) + gzip.compress(b"") + gzip.compress(BODY[9:])),
        ("identity", BODY),
        ("", BODY),
    ],
    ids=["gzip", "capitals", "x-gzip", "several members", "identity", "empty"],
)
async def test_an_encoded_body_is_answered(open_app: OpenApp, encoding: str, content: bytes) -> None:
    headers = {"content-encoding": encoding, "content-type": "application/json"}
    async with open_app(one_token) as app:
        answer = await app.client.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip", "gzip, identity"])
async def test_another_encoding_is_refused_by_name(open_app: OpenApp, encoding: str) -> None:
    headers = {"content-encoding": encoding, "content-type": "application/json"}
    async with open_app() as app:
        answer = await app.client.post("/v1/completions", content=BODY, headers=headers)
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "gzip")
    assert f"'{encoding}'" in answer.json()["error"]["message"]
    assert "gzip, x-gzip, identity" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        gzip.compress(BODY)[:-1],
        gzip.compress(BODY)[:10],
        gzip.compress(BODY)[:-5] + b"\0" + gzip.compress(BODY)[-4:],
        gzip.compress(BODY) + b"\0\0\0\0",
        gzip.compress(BODY) + BODY,
        gzip.compress(BODY) + gzip.compress(BODY)[:-1],
        zlib.compress(BODY),
        BODY,
    ],
    ids=["nothing", "cut", "a head", "checksum", "padding", "garbage", "cut member", "zlib", "plain"],
)
async def test_what_is_not_gzip_is_refused(open_app: OpenApp, content: bytes) -> None:
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    async with open_app() as app:
        answer = await app.client.post("/v1/completions", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_content_encoding")


async def test_a_bomb_is_refused(open_app: OpenApp) -> None:
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    async with open_app(max_body_bytes=LIMIT) as app:
        bomb = gzip.compress(bytes(200 * LIMIT))
        answer = await app.client.post("/v1/completions", content=bomb, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        assert "--max-body-bytes" in answer.json()["error"]["message"]
        # The compressed bytes count too.
        answer = await app.client.post("/v1/completions", content=bytes(LIMIT + 1), headers=headers)
        assert answer.status_code == 413


class Decoded:
    """The body that an app behind the middleware receives, if it comes in these pieces."""

    def __init__(self, *pieces: bytes, limit: int = LIMIT) -> None:
        self._pieces = list(pieces)
        self._limit = limit
        self.messages: list[Message] = []

    async def run(self) -> bytes:
        headers = [(b"content-encoding", b"gzip"), (b"content-length", b"1"), (b"x", b"y")]
        scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
        app = ContentEncoding(self._read, ServerConfig(max_body_bytes=self._limit))
        await app(scope, self._receive, self._send)
        return b"".join(message["body"] for message in self.messages)

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        assert scope["headers"] == [(b"x", b"y")]
        while not self.messages or self.messages[-1]["more_body"]:
            self.messages.append(await receive())
        assert (await receive())["type"] == "http.disconnect"

    async def _receive(self) -> Message:
        if not self._pieces:
            return {"type": "http.disconnect"}
        piece = self._pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(self._pieces)}

    async def _send(self, message: Message) -> None:
        raise AssertionError(message)


def cut(content: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


@pytest.mark.parametrize("size", [0, 1, 256 << 10, (256 << 10) + 1, LIMIT])
@pytest.mark.parametrize("kind", ["zeros", "noise"])
async def test_every_byte_comes_out_once_however_it_came(size: int, kind: str) -> None:
    content = bytes(size) if kind == "zeros" else random.Random(1).randbytes(size)  # noqa: S311
    compressed = gzip.compress(content)
    for step in (997, 20_000, len(compressed)):
        assert await Decoded(*cut(compressed, step)).run() == content
    body = Decoded(gzip.compress(b"") * 1000 + compressed)
    assert await body.run() == content


async def test_a_bomb_is_inflated_by_at_most_a_piece_over_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inflated: list[int] = []
    make = zlib.decompressobj

    class Counting:
        def __init__(self, *arguments: Any) -> None:
            self._inflater = make(*arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inflater, name)

        def decompress(self, data: bytes, most: int) -> bytes:
            piece: bytes = self._inflater.decompress(data, most)
            inflated.append(len(piece))
            return piece

    monkeypatch.setattr(zlib, "decompressobj", Counting)
    with pytest.raises(ApiError) as caught:
        await Decoded(gzip.compress(bytes(100 * LIMIT))).run()
    assert caught.value.status == 413
    assert LIMIT < sum(inflated) <= LIMIT + max(inflated)
    assert max(inflated) <= 256 << 10
