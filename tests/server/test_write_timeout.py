"""Clients that stop reading, below HTTP: they are dropped unless slices show their progress."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import orjson
import pytest
from logitengine.link.messages import Array, GenerationRequest, LogitsRows, PromptOutput, StepOutput
from logitserve.http.connection import EXTENSION
from logitserve.http.middleware.write_timeout import CHECKS, SLICE_BYTES
from scripted_engine import OpenApp, Script, Step
from starlette.websockets import WebSocket
from websocket_scope import connect

pytestmark = pytest.mark.anyio

SECONDS = 0.02
COMPLETIONS = "/v1/completions"
WHOLE = {"prompt": "Hi", "max_tokens": 1}
STREAMED = {**WHOLE, "stream": True}
ROWS = {"input": [5, 6], "token_ids": [1, 2]}


class FakeConnection:
    """Connection whose client takes a byte between any two looks, until ``takes`` bytes are taken."""

    def __init__(self, takes: int = 0) -> None:
        self.untaken = takes
        self.taken = asyncio.Event()
        self.is_aborted = False

    def num_untaken_bytes(self) -> int:
        self.untaken = max(0, self.untaken - 1)
        if self.untaken == 0:
            self.taken.set()
        return self.untaken

    def abort(self) -> None:
        self.is_aborted = True


def script(request: GenerationRequest) -> list[Step]:
    """Give a row or a token at once, and then nothing."""
    prompt = None
    if request.sampling.max_tokens == 0:
        values = Array("float32", (1, 2), np.zeros(2, np.float32).tobytes())
        prompt = PromptOutput(offset=0, logits=LogitsRows(values=values))
    output = StepOutput(request_id=request.request_id, index=0, token_ids=[33], prompt=prompt)
    return [output, asyncio.get_running_loop().create_future()]


def whole_script(request: GenerationRequest) -> list[Step]:
    return [StepOutput(request_id=request.request_id, index=0, token_ids=[33], finish_reason="length")]


ANSWERS: dict[str, tuple[str, dict[str, Any] | None, Script]] = {
    "stream": (COMPLETIONS, STREAMED, script),
    "Arrow": ("/v1/logits", ROWS, script),
    "whole": (COMPLETIONS, WHOLE, whole_script),
    "error": (COMPLETIONS, {"prompt": 3}, whole_script),
    "models": ("/v1/models", None, whole_script),
    "404": ("/nope", None, whole_script),
}


@pytest.mark.parametrize("has_connection", [True, False], ids=["our server", "another server"])
@pytest.mark.parametrize("stalls_at", ["http.response.start", "http.response.body"])
async def test_a_client_that_takes_nothing_ends_its_request(
    open_app: OpenApp, caplog: pytest.LogCaptureFixture, stalls_at: str, *, has_connection: bool
) -> None:
    async def send(message: Any) -> None:
        if message["type"] == stalls_at:
            await asyncio.Event().wait()

    async with open_app(write_timeout=SECONDS) as app:
        for name, (path, body, app.engine.script) in ANSWERS.items():
            connection = FakeConnection()
            extensions = {EXTENSION: connection} if has_connection else {}
            caplog.clear()
            await app.asgi_post(path, body, send, extensions=extensions)
            assert app.engine.num_open == 0, name
            assert app.state.idle.is_set(), name
            assert connection.is_aborted == has_connection, name
            assert "took nothing" in caplog.text, name
            assert "unforeseen" not in caplog.text, name


async def test_a_client_that_takes_little_is_not_dropped_while_one_piece_leaves(open_app: OpenApp) -> None:
    """The send of the one piece lasts many timeouts."""
    connection = FakeConnection(takes=10 * CHECKS)
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        if message.get("body"):
            await connection.taken.wait()
        sent.append(bytes(message.get("body", b"")))

    async with open_app(whole_script, write_timeout=SECONDS) as app:
        await app.asgi_post(COMPLETIONS, WHOLE, send, extensions={EXTENSION: connection})
    assert not connection.is_aborted
    assert orjson.loads(b"".join(sent))["usage"]["completion_tokens"] == 1


async def test_a_client_with_nothing_to_take_is_not_dropped(open_app: OpenApp) -> None:
    """The engine thinks for many timeouts between two tokens."""
    connection = FakeConnection()
    sent: list[bytes] = []

    def slow(request: GenerationRequest) -> list[Step]:
        first = StepOutput(request_id=request.request_id, index=0, token_ids=[33])
        return [first, asyncio.sleep(10 * SECONDS), *whole_script(request)]

    async def send(message: Any) -> None:
        sent.append(bytes(message.get("body", b"")))

    async with open_app(slow, write_timeout=SECONDS) as app:
        await app.asgi_post(COMPLETIONS, STREAMED, send, extensions={EXTENSION: connection})
    assert not connection.is_aborted
    assert b"".join(sent).endswith(b"data: [DONE]\n\n")


async def test_a_long_body_is_sent_in_views_of_itself_and_its_end_apart(open_app: OpenApp) -> None:
    """Each message, the end included, waits until the server has taken the one before."""
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    def rows(request: GenerationRequest) -> list[Step]:
        values = np.arange(SLICE_BYTES, dtype=np.float32)
        logits = LogitsRows(values=Array("float32", (1, len(values)), values.tobytes()))
        (output,) = whole_script(request)
        assert isinstance(output, StepOutput)
        return [
            StepOutput(
                request_id=output.request_id, index=0, token_ids=[33], logits=logits, finish_reason="length"
            )
        ]

    async with open_app(rows) as app:
        await app.asgi_post(COMPLETIONS, {**WHOLE, "return_logits": True}, send)
    start, *slices, end = messages
    length = int(dict(start["headers"])[b"content-length"])
    assert length > 4 * SLICE_BYTES
    long = [message["body"] for message in slices if len(message["body"]) == SLICE_BYTES]
    assert len(long) >= length // SLICE_BYTES - 1
    assert all(isinstance(body, memoryview) for body in long)
    assert all(len(message["body"]) <= SLICE_BYTES and message["more_body"] for message in slices)
    assert sum(len(message["body"]) for message in slices) == length
    assert (end["body"], end["more_body"]) == (b"", False)
    answer = orjson.loads(b"".join(message["body"] for message in slices))
    assert answer["choices"][0]["logits"]["generated"]["shape"] == [1, SLICE_BYTES]


async def test_a_websocket_whose_client_takes_nothing_ends(
    open_app: OpenApp, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("Hi")

    async def send(message: Any) -> None:
        if message["type"] == "websocket.send":
            await asyncio.Event().wait()

    async with open_app(write_timeout=SECONDS) as app:
        app.asgi.add_api_websocket_route("/talk", talk)
        await connect(app.asgi, "/talk", {}, send=send)
        assert app.state.idle.is_set()
    assert "took nothing" in caplog.text
