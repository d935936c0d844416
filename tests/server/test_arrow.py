"""The Arrow answer in front of a scripted engine: the order of its messages, and the signs of a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from logitengine.errors import EngineDeadError, EngineOverloadedError
from logitengine.link.messages import (
    Array,
    GenerationRequest,
    LogitsRows,
    Logprobs,
    PromptOutput,
    StepOutput,
)
from scripted_engine import App, OpenApp, Step

pytestmark = pytest.mark.anyio

END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
BODY = {"input": [5, 6, 7, 8], "token_ids": [1, 2]}


def rows(count: int, first: float) -> LogitsRows:
    values = np.arange(count * 2, dtype=np.float32).reshape(count, 2) + first
    ids = np.tile(np.array([1, 2], np.int32), (count, 1))
    return LogitsRows(
        values=Array("float32", values.shape, values.tobytes()),
        token_ids=Array("int32", ids.shape, ids.tobytes()),
    )


def prompt_output(request: GenerationRequest, offset: int, count: int, *, last: bool = False) -> StepOutput:
    scored = count - 1 if last else count
    scores = Logprobs(
        token_logprobs=[-1.0] * scored,
        ranks=[0] * scored,
        top_ids=[[]] * scored,
        top_logprobs=[[]] * scored,
    )
    return StepOutput(
        request_id=request.request_id,
        index=0,
        prompt=PromptOutput(offset=offset, logits=rows(count, offset), logprobs=scores),
        finish_reason="length" if last else None,
    )


async def asgi_post(
    app: App, body: dict[str, Any], on_body: Callable[[bytes], Any] = lambda _: None
) -> list[dict[str, Any]]:
    """POST /v1/logits without an HTTP library, and return the messages that the app sent.

    ``on_body`` gets every piece of the body, and its result is awaited.
    """
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)
        if message.get("body") and (waiting := on_body(bytes(message["body"]))) is not None:
            await waiting

    await app.asgi_post("/v1/logits", body, send)
    return sent


def content(sent: list[dict[str, Any]]) -> bytes:
    return b"".join(bytes(message.get("body", b"")) for message in sent)


async def test_every_block_is_a_batch_and_the_stream_has_an_end(open_app: OpenApp) -> None:
    def script(request: GenerationRequest) -> list[Step]:
        return [prompt_output(request, 0, 3), prompt_output(request, 3, 1, last=True)]

    async with open_app(script) as app:
        response = await app.post("/v1/logits", BODY)
    assert response.content.endswith(END_OF_STREAM)
    first, second = pa.ipc.open_stream(response.content)
    assert first.to_pydict() == {
        "sequence": [0, 0, 0],
        "position": [1, 2, 3],
        "token_id": [6, 7, 8],
        "logprob": [-1.0, -1.0, -1.0],
        "logits": [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]],
    }
    assert second["position"].to_pylist() == [4]
    assert second["token_id"].to_pylist() == [None]
    assert second["logprob"].to_pylist() == [None]
    (request,) = app.engine.requests
    assert request.sampling.max_tokens == 0
    assert (request.prompt_logprobs, request.logprobs) == (0, None)


async def test_a_failure_before_the_first_row_is_an_error_object(open_app: OpenApp) -> None:
    async with open_app(lambda _: [EngineOverloadedError("full")]) as app:
        response = await app.post("/v1/logits", BODY)
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "engine_overloaded"


async def test_a_failure_after_the_first_row_leaves_stream_and_body_without_their_ends(
    open_app: OpenApp,
) -> None:
    def script(request: GenerationRequest) -> list[Step]:
        return [prompt_output(request, 0, 3), EngineDeadError("gone")]

    async with open_app(script) as app:
        sent = await asgi_post(app, BODY)
        assert app.engine.num_open == 0
    assert sent[0]["status"] == 200
    assert all(message["more_body"] for message in sent[1:])
    assert not content(sent).endswith(END_OF_STREAM)
    assert next(pa.ipc.open_stream(content(sent))).num_rows == 3


async def test_the_next_rows_are_asked_for_when_the_last_ones_have_left(open_app: OpenApp) -> None:
    """An output counts against the engine's window until the next output is requested."""
    asked: list[int] = []
    seen: list[int] = []

    def script(request: GenerationRequest) -> list[Step]:
        async def note(number: int) -> None:
            asked.append(number)

        steps: list[Step] = []
        for number in range(4):
            steps += [note(number), prompt_output(request, number, 1, last=number == 3)]
        return steps

    async def slow_reader(_: bytes) -> None:
        seen.append(len(asked))
        await asyncio.sleep(0)

    async with open_app(script) as app:
        await asgi_post(app, BODY, slow_reader)
    # Batches leave piece by piece. Output i + 1 is not requested while pieces of batch i leave.
    assert sorted(set(seen)) == [1, 2, 3, 4]
    assert seen == sorted(seen)
    assert seen[0] == 1


async def test_concurrent_inputs_are_bounded_by_the_bytes_of_their_rows(open_app: OpenApp) -> None:
    """Each of the twenty inputs has 64 rows of the whole vocabulary, 12 MiB, so five run at once."""
    most = 0

    def script(request: GenerationRequest) -> list[Step]:
        async def note() -> None:
            nonlocal most
            most = max(most, app.engine.num_open)
            await asyncio.sleep(0)

        return [note(), prompt_output(request, 0, 1, last=True)]

    async with open_app(script) as app:
        response = await app.post(
            "/v1/logits", {"input": [[5] * 64] * 20}, headers={"accept": "application/json"}
        )
        assert response.status_code == 200
        assert len(response.json()["data"]) == 20
    assert most == 5


@pytest.mark.parametrize("path", ["/v1/perplexity", "/v1/embeddings"])
async def test_a_client_that_leaves_ends_the_reading(open_app: OpenApp, path: str) -> None:
    async with open_app(lambda _: [asyncio.Event().wait()]) as app:
        call = asyncio.create_task(app.post(path, {"input": ["a", "b"]}))
        await app.engine.running(2)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert app.engine.num_open == 0
