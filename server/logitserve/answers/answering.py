"""A prepared job to an HTTP response: streamed or whole, aborted when the client goes away."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from typing import Protocol

import orjson
from fastapi import Request
from fastapi.responses import Response

from logitserve.answers.answer import Answer
from logitserve.answers.arrow import ArrowAnswer
from logitserve.answers.generation import Counts, Delta, Generation
from logitserve.errors import from_exception
from logitserve.http.request_log import LogFields
from logitserve.http.sse import (
    DONE,
    ArrowStream,
    ClientDisconnectedError,
    EventStream,
    event,
    until_disconnect,
)
from logitserve.jobs.job import Job
from logitserve.state import ServerState

INLINE_BASE64_BYTES = 1 << 20
INLINE_LIST_BYTES = 1 << 14
"""Rows up to this size are encoded on the event loop: a thread would take longer to reach. Lists cost 40 times base64."""

CLIENT_CLOSED_REQUEST = 499


class WholeAnswer(Protocol):
    """Collects deltas into one body."""

    def add(self, delta: Delta) -> None: ...

    def whole(self, counts: Counts) -> bytes: ...


async def respond(job: Job, answer: Answer, state: ServerState, request: Request) -> Response:
    """Run the job and answer as its body asks. Raises EngineError or ApiError while nothing has been sent."""
    LogFields.of(request.scope).answer_id = answer.id
    if not job.body.stream:
        return await respond_whole(job, answer, state, request)
    generation = _begin(job, state, request)
    deltas = generation.deltas()
    try:
        first = await _first(deltas, request)
    except ClientDisconnectedError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return EventStream(_events(first, deltas, job, answer, state, generation), deltas)


async def respond_whole(job: Job, answer: WholeAnswer, state: ServerState, request: Request) -> Response:
    """Run the job and answer with one JSON body. Raises EngineError or ApiError."""
    generation = _begin(job, state, request)
    inline = _inline_bytes(job)

    async def collect() -> bytes:
        nbytes = 0
        async with contextlib.aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                nbytes += delta.nbytes
                await state.encode(partial(answer.add, delta), delta.nbytes, inline)
        return await state.encode(partial(answer.whole, generation.counts), nbytes, inline)

    try:
        body = await until_disconnect(request.receive, collect())
    except ClientDisconnectedError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(body, media_type="application/json")


async def respond_arrow(job: Job, answer: ArrowAnswer, state: ServerState, request: Request) -> Response:
    """Run the job and send its rows as they come. Raises EngineError or ApiError while nothing has been sent."""
    deltas = _begin(job, state, request).deltas()
    try:
        first = await _first(deltas, request)
    except ClientDisconnectedError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return ArrowStream(_batches(first, deltas, answer), deltas)


def _begin(job: Job, state: ServerState, request: Request) -> Generation:
    generation = Generation(state.engine, job, state.model().tokenizer.table)
    LogFields.of(request.scope).counts = generation.counts
    return generation


async def _first(deltas: AsyncIterator[Delta], request: Request) -> Delta:
    """The first delta, which decides the status: a refusal is no stream. Raises ClientDisconnectedError."""

    async def wait() -> Delta:
        return await anext(deltas)

    return await until_disconnect(request.receive, wait())


async def _events(
    first: Delta,
    deltas: AsyncIterator[Delta],
    job: Job,
    answer: Answer,
    state: ServerState,
    generation: Generation,
) -> AsyncGenerator[bytes, None]:
    """Chunks, usage where asked for, [DONE]; or after a failure one error event and nothing more."""
    inline = _inline_bytes(job)
    try:
        async for delta in _with_first(first, deltas):
            if not answer.says_nothing(delta):
                for chunk in await state.encode(partial(answer.chunks, delta), delta.nbytes, inline):
                    yield event(chunk)
    except Exception as error:  # noqa: BLE001 - the status is sent: whatever happens must be said in the stream
        yield event(orjson.dumps(from_exception(error).body()))
        return
    if job.body.include_usage:
        yield event(answer.usage_chunk(generation.counts))
    yield DONE


async def _batches(
    first: Delta, deltas: AsyncIterator[Delta], answer: ArrowAnswer
) -> AsyncGenerator[bytes | memoryview, None]:
    """The next delta is asked for when the batches of this one have left: so a slow reader slows its own request."""
    async for delta in _with_first(first, deltas):
        for piece in answer.batches(delta):
            yield piece
    for piece in answer.end():
        yield piece


async def _with_first(first: Delta, rest: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    yield first
    async for delta in rest:
        yield delta


def _inline_bytes(job: Job) -> int:
    rows = (job.body.return_logits, job.body.return_hidden_states)
    as_lists = any(wanted is not None and wanted.wire_encoding == "list" for wanted in rows)
    return INLINE_LIST_BYTES if as_lists else INLINE_BASE64_BYTES
