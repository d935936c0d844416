"""Streams that are silent for a while: their pings, and failures after a ping."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from logitengine.errors import EngineDeadError, EngineError
from logitengine.link.messages import Array, GenerationRequest, LogitsRows, PromptOutput, StepOutput
from scripted_engine import App, OpenApp, Script, Step

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"
STREAM = {"prompt": "Hi", "max_tokens": 9, "stream": True}
WHOLE = {"prompt": "Hi", "max_tokens": 9}
ROWS = {"input": [5, 6], "token_ids": [1, 2]}
PING = b": ping\n\n"
SECONDS = 0.01


class Client:
    """A client below HTTP. It notes what it gets, and may hold up the app at a message."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.hold: Callable[[dict[str, Any]], Awaitable[object] | None] = lambda _: None
        self._got = asyncio.Condition()

    async def send(self, message: Any) -> None:
        self.messages.append(message)
        async with self._got:
            self._got.notify_all()
        held = self.hold(message)
        if held is not None:
            await held

    async def has(self, count: int, piece: bytes = PING) -> None:
        """Wait until so many messages hold just this."""
        async with self._got, asyncio.timeout(30):
            await self._got.wait_for(lambda: self.pieces.count(piece) >= count)

    @property
    def pieces(self) -> list[bytes]:
        bodies = self.messages[1:]
        return [bytes(message["body"]) for message in bodies if message["body"]]

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def is_whole(self) -> bool:
        return not self.messages[-1].get("more_body", False)


def token(request: GenerationRequest, *, last: bool = False) -> StepOutput:
    return StepOutput(
        request_id=request.request_id, index=0, token_ids=[33], finish_reason="length" if last else None
    )


def rows(request: GenerationRequest) -> list[StepOutput]:
    values = Array("float32", (1, 2), np.ones(2, np.float32).tobytes())
    blocks = [PromptOutput(offset=offset, logits=LogitsRows(values=values)) for offset in range(2)]
    ends = [None, "length"]
    return [
        StepOutput(request_id=request.request_id, index=0, prompt=block, finish_reason=end)  # type: ignore[arg-type]
        for block, end in zip(blocks, ends, strict=True)
    ]


def posted(app: App, client: Client, path: str, body: dict[str, Any]) -> asyncio.Task[None]:
    return asyncio.ensure_future(app.asgi_post(path, body, client.send))


def chunks(pieces: list[bytes]) -> list[Any]:
    text = b"".join(pieces).decode()
    return [json.loads(part[6:]) for part in text.split("\n\n") if part.startswith("data: {")]


async def test_a_silent_stream_begins_and_pings_until_there_is_a_token(open_app: OpenApp) -> None:
    goes_on = asyncio.Event()
    async with open_app(lambda r: [goes_on.wait(), token(r, last=True)], ping_interval=SECONDS) as app:
        client = Client()
        answering = posted(app, client, COMPLETIONS, STREAM)
        await client.has(3)
        assert client.status == 200
        assert set(client.pieces) == {PING}
        goes_on.set()
        await answering
    assert len(chunks(client.pieces)) == 1
    assert client.pieces[-1] == b"data: [DONE]\n\n"
    assert client.is_whole


async def test_silences_between_tokens_have_pings(open_app: OpenApp) -> None:
    goes_on = asyncio.Event()
    script: Script = lambda r: [token(r), goes_on.wait(), token(r, last=True)]  # noqa: E731
    async with open_app(script, ping_interval=SECONDS) as app:
        client = Client()
        answering = posted(app, client, COMPLETIONS, STREAM)
        await client.has(2)
        goes_on.set()
        await answering
    first, *others = [piece for piece in client.pieces if piece.startswith((b"data: {", b":"))]
    assert first.startswith(b"data: {")
    assert others[0] == PING
    assert len(chunks(client.pieces)) == 2


async def test_a_failure_after_a_ping_is_an_error_event(open_app: OpenApp) -> None:
    goes_on = asyncio.Event()
    script: Script = lambda _: [goes_on.wait(), EngineDeadError("it died")]  # noqa: E731
    async with open_app(script, ping_interval=SECONDS) as app:
        client = Client()
        answering = posted(app, client, COMPLETIONS, STREAM)
        await client.has(1)
        goes_on.set()
        await answering
    assert client.status == 200
    (told,) = chunks(client.pieces)
    assert told["error"]["code"] == "engine_dead"
    assert b"data: [DONE]\n\n" not in client.pieces
    assert client.is_whole


@pytest.mark.parametrize("interval", [0.0, SECONDS])
async def test_a_refusal_before_a_ping_keeps_its_status(open_app: OpenApp, interval: float) -> None:
    async with open_app(lambda _: [EngineDeadError("it died")], ping_interval=interval) as app:
        answer = await app.post(COMPLETIONS, STREAM)
    assert answer.status_code == 503


async def test_a_stream_with_pings_turned_off_and_a_whole_answer_stay_silent(open_app: OpenApp) -> None:
    """Both run for as long as a stream that has had several pings."""
    never = asyncio.Event()
    script: Script = lambda r: [never.wait(), token(r, last=True)]  # noqa: E731
    async with open_app(script, ping_interval=SECONDS) as app, open_app(script, ping_interval=0) as other:
        whole, stream, pinged = Client(), Client(), Client()
        answering = [
            posted(app, whole, COMPLETIONS, WHOLE),
            posted(other, stream, COMPLETIONS, STREAM),
            posted(app, pinged, COMPLETIONS, STREAM),
        ]
        await pinged.has(5)
        assert whole.messages == []
        assert stream.messages == []
        never.set()
        await asyncio.gather(*answering)
    assert PING not in whole.pieces + stream.pieces


async def test_no_ping_cuts_into_a_piece_that_its_reader_has_not_taken(open_app: OpenApp) -> None:
    never, taken = asyncio.Event(), asyncio.Event()

    def script(request: GenerationRequest) -> list[Step]:
        return [token(request, last=True)] if request.prompt_token_ids == [5] else [never.wait()]

    async with open_app(script, ping_interval=SECONDS) as app:
        slow, pinged = Client(), Client()
        slow.hold = lambda message: taken.wait() if message.get("body", b"").startswith(b"data: {") else None
        answering = posted(app, slow, COMPLETIONS, {**STREAM, "prompt": [5]})
        waiting = posted(app, pinged, COMPLETIONS, STREAM)
        await pinged.has(5)
        assert PING not in slow.pieces
        taken.set()
        await answering
        assert slow.is_whole
        never.set()
        await waiting


async def test_a_token_waits_for_a_ping_that_its_reader_has_not_taken(open_app: OpenApp) -> None:
    goes_on, taken = asyncio.Event(), asyncio.Event()
    under_way: list[bool] = []

    async def take(message: dict[str, Any]) -> None:
        under_way.append(True)
        if message.get("body") == PING:
            goes_on.set()
            await taken.wait()
        assert len(under_way) == 1, "one message at a time"
        under_way.pop()

    def script(request: GenerationRequest) -> list[Step]:
        if request.prompt_token_ids == [5]:
            return [goes_on.wait(), token(request, last=True)]
        return [asyncio.Event().wait()]

    async with open_app(script, ping_interval=SECONDS) as app:
        slow, pinged = Client(), Client()
        slow.hold = take
        answering = posted(app, slow, COMPLETIONS, {**STREAM, "prompt": [5]})
        waiting = posted(app, pinged, COMPLETIONS, STREAM)
        await slow.has(1)
        await pinged.has(len(pinged.pieces) + 3)
        assert slow.pieces == [PING]
        taken.set()
        await answering
        assert slow.is_whole
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_a_client_that_goes_away_during_a_ping_leaves_nothing_behind(open_app: OpenApp) -> None:
    async with open_app(lambda _: [asyncio.Event().wait()], ping_interval=SECONDS) as app:
        client = Client()
        client.hold = lambda message: asyncio.Event().wait() if message.get("body") == PING else None
        answering = posted(app, client, COMPLETIONS, STREAM)
        await client.has(1)
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
        assert app.engine.num_open == 0
        assert [task for task in asyncio.all_tasks() if "_fill" in repr(task)] == []


async def test_a_silent_arrow_stream_sends_its_schema_and_then_its_batches(open_app: OpenApp) -> None:
    goes_on = asyncio.Event()
    script: Script = lambda r: [goes_on.wait(), *rows(r)]  # noqa: E731
    async with open_app(script, ping_interval=SECONDS) as app, open_app(rows) as prompt_app:
        client, timer = Client(), Client()
        answering = posted(app, client, "/v1/logits", ROWS)
        waiting = posted(app, timer, COMPLETIONS, STREAM)
        await timer.has(4)
        assert len(client.messages) == 2, "the head, and the schema once"
        assert pa.ipc.read_schema(pa.py_buffer(client.pieces[0])).names[0] == "sequence"
        goes_on.set()
        await answering
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        at_once = await prompt_app.post("/v1/logits", ROWS)
    told = b"".join(client.pieces)
    assert told == at_once.content, "whether there was a silence does not show in the bytes"
    assert pa.ipc.open_stream(told).read_all().num_rows == 2


async def test_an_arrow_stream_that_fails_after_its_schema_is_cut_off(open_app: OpenApp) -> None:
    goes_on = asyncio.Event()
    error: EngineError = EngineDeadError("it died")
    async with open_app(lambda _: [goes_on.wait(), error], ping_interval=SECONDS) as app:
        client, timer = Client(), Client()
        answering = posted(app, client, "/v1/logits", ROWS)
        waiting = posted(app, timer, COMPLETIONS, STREAM)
        await timer.has(3)
        goes_on.set()
        await asyncio.gather(answering, waiting)
    assert client.status == 200
    assert not client.is_whole
