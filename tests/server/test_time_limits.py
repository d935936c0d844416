"""Limits on a request's wait for its turn, and on its whole time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest
from logitengine.link.messages import Array, GenerationRequest, LogitsRows, PromptOutput, StepOutput
from scripted_engine import App, OpenApp, Step

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"
WHOLE = {"prompt": [5], "max_tokens": 9}
STREAM = {**WHOLE, "stream": True}
SECONDS = 0.02
NEVER = 1000.0


def token(request: GenerationRequest, *, last: bool = False) -> StepOutput:
    return StepOutput(
        request_id=request.request_id, index=0, token_ids=[33], finish_reason="length" if last else None
    )


def beginning(request: GenerationRequest) -> StepOutput:
    """Return the engine's output after the first part of a long prompt."""
    return StepOutput(request_id=request.request_id, index=0)


def nothing(_: GenerationRequest) -> list[Step]:
    return [asyncio.Event().wait()]


def then_nothing(request: GenerationRequest) -> list[Step]:
    return [token(request), asyncio.Event().wait()]


def events(text: str) -> list[Any]:
    return [json.loads(part[6:]) for part in text.split("\n\n") if part.startswith("data: {")]


@pytest.mark.parametrize(
    "body", [WHOLE, STREAM, {**WHOLE, "prompt": [[5]] * 3}], ids=["whole", "stream", "batch"]
)
async def test_a_request_that_does_not_begin_is_told_to_come_again(
    open_app: OpenApp, body: dict[str, Any]
) -> None:
    async with open_app(nothing, queue_timeout=SECONDS) as app:
        answer = await app.post(COMPLETIONS, body)
        assert app.engine.num_open == 0
        assert (app.state.queue.num_requests, app.state.queue.num_tokens) == (0, 0)
    assert answer.status_code == 503
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    error = answer.json()["error"]
    assert error["code"] == "queue_timeout"
    assert "--queue-timeout" in error["message"]


async def test_a_request_that_has_begun_waits_as_long_as_it_takes(open_app: OpenApp) -> None:
    """The request outlives another that did not begin in time."""
    goes_on = asyncio.Event()

    def script(request: GenerationRequest) -> list[Step]:
        if request.prompt_token_ids == [5]:
            return [beginning(request), goes_on.wait(), token(request, last=True)]
        return nothing(request)

    async with open_app(script, queue_timeout=SECONDS) as app:
        answering = asyncio.ensure_future(app.post(COMPLETIONS, STREAM))
        await app.engine.running(1)
        assert (await app.post(COMPLETIONS, {**WHOLE, "prompt": [6]})).status_code == 503
        goes_on.set()
        answer = await answering
    assert answer.status_code == 200
    assert len(events(answer.text)) == 1, "what says nothing is no event"


async def test_a_stream_whose_head_is_out_is_told_of_its_wait_in_an_event(open_app: OpenApp) -> None:
    async with open_app(nothing, queue_timeout=10 * SECONDS, ping_interval=SECONDS) as app:
        answer = await app.post(COMPLETIONS, STREAM)
    assert answer.status_code == 200
    assert answer.text.startswith(": ping\n\n")
    assert events(answer.text)[0]["error"]["code"] == "queue_timeout"


@pytest.mark.parametrize("script", [nothing, then_nothing], ids=["nothing", "a token"])
async def test_a_whole_answer_that_takes_too_long_is_not_to_be_tried_again(
    open_app: OpenApp, script: Any
) -> None:
    async with open_app(script, request_timeout=SECONDS) as app:
        answer = await app.post(COMPLETIONS, WHOLE)
        assert app.engine.num_open == 0
        assert app.state.held_bytes.num_answer_bytes == 0
    assert answer.status_code == 504
    assert answer.headers["x-should-retry"] == "false"
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("request_timeout", "server_error")
    assert "--request-timeout" in error["message"]


async def test_a_stream_without_a_token_that_takes_too_long_has_the_status(open_app: OpenApp) -> None:
    async with open_app(nothing, request_timeout=SECONDS) as app:
        answer = await app.post(COMPLETIONS, STREAM)
    assert answer.status_code == 504
    assert answer.headers["x-should-retry"] == "false"


async def test_a_stream_that_has_begun_is_told_in_an_event(open_app: OpenApp) -> None:
    async with open_app(then_nothing, request_timeout=SECONDS) as app:
        answer = await app.post(COMPLETIONS, STREAM)
        assert app.engine.num_open == 0
    assert answer.status_code == 200
    first, last = events(answer.text)
    assert first["choices"][0]["text"]
    assert last["error"]["code"] == "request_timeout"
    assert "[DONE]" not in answer.text


async def test_an_arrow_stream_that_takes_too_long_is_cut_off(open_app: OpenApp) -> None:
    def script(request: GenerationRequest) -> list[Step]:
        values = Array("float32", (1, 1), np.ones(1, np.float32).tobytes())
        prompt = PromptOutput(offset=0, logits=LogitsRows(values=values))
        return [
            StepOutput(request_id=request.request_id, index=0, prompt=prompt),
            asyncio.Event().wait(),
        ]

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async with open_app(script, request_timeout=SECONDS) as app:
        await app.asgi_post("/v1/logits", {"input": [5, 6], "token_ids": [1]}, send)
        assert app.engine.num_open == 0
    assert sent[0]["status"] == 200
    assert sent[-1]["more_body"] is True


async def test_time_in_which_the_reader_takes_nothing_is_not_the_requests(open_app: OpenApp) -> None:
    """The reader goes on after a later request has run out of time."""
    taken = asyncio.Event()
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        if message.get("body", b"").startswith(b"data: {"):
            await taken.wait()

    def script(request: GenerationRequest) -> list[Step]:
        if request.prompt_token_ids == [5]:
            return [token(request), token(request, last=True)]
        return nothing(request)

    async with open_app(script, request_timeout=10 * SECONDS) as app:
        answering = asyncio.ensure_future(app.asgi_post(COMPLETIONS, STREAM, send))
        await app.engine.running(1)
        assert (await app.post(COMPLETIONS, {**WHOLE, "prompt": [6]})).status_code == 504
        taken.set()
        await answering
    assert sent[-2]["body"] == b"data: [DONE]\n\n"


async def test_no_limits_end_nothing(open_app: OpenApp) -> None:
    goes_on = asyncio.Event()

    def script(request: GenerationRequest) -> list[Step]:
        return [goes_on.wait(), token(request, last=True)]

    async def timed_out(app: App) -> None:
        assert (await app.post(COMPLETIONS, WHOLE)).status_code == 504

    async with (
        open_app(script, request_timeout=0, queue_timeout=0) as app,
        open_app(nothing, request_timeout=SECONDS) as other,
    ):
        answering = asyncio.ensure_future(app.post(COMPLETIONS, WHOLE))
        await app.engine.running(1)
        await timed_out(other)
        goes_on.set()
        assert (await answering).status_code == 200
