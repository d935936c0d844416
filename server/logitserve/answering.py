"""A prepared job to an HTTP response: streamed or whole, aborted when the client goes away."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial

import orjson
from fastapi import Request
from fastapi.responses import Response

from logitserve.answers.answer import Answer
from logitserve.errors import from_exception
from logitserve.generation import Delta, Generation
from logitserve.job import Job
from logitserve.middleware import LogFields
from logitserve.sse import DONE, ClientDisconnectedError, EventStream, event, until_disconnect
from logitserve.state import ServerState

INLINE_BASE64_BYTES = 1 << 20
INLINE_LIST_BYTES = 1 << 14
"""Rows up to this size are encoded on the event loop: a thread would take longer to reach. Lists cost 40 times base64."""

CLIENT_CLOSED_REQUEST = 499


async def respond(job: Job, answer: Answer, state: ServerState, request: Request) -> Response:
    """Run the job. Raises EngineError or ApiError while nothing has been sent."""
    generation = Generation(state.engine, job, answer.model.texts.table)
    log = LogFields.of(request.scope)
    log.answer_id = answer.id
    log.counts = generation.counts
    deltas = generation.deltas()
    if not job.body.stream:
        return await _whole(job, answer, state, request, generation, deltas)
    try:
        # The first delta decides the status: a refusal is no stream.
        first = await until_disconnect(request.receive, anext_of(deltas))
    except ClientDisconnectedError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return EventStream(_events(first, deltas, job, answer, state, generation))


async def anext_of(deltas: AsyncIterator[Delta]) -> Delta:
    return await anext(deltas)


async def _whole(
    job: Job,
    answer: Answer,
    state: ServerState,
    request: Request,
    generation: Generation,
    deltas: AsyncGenerator[Delta, None],
) -> Response:
    inline = _inline_bytes(job)

    async def collect() -> bytes:
        nbytes = 0
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                nbytes += delta.nbytes
                await state.encode(partial(answer.add, delta), delta.nbytes, inline)
        return await state.encode(partial(answer.whole, generation.counts), nbytes, inline)

    try:
        body = await until_disconnect(request.receive, collect())
    except ClientDisconnectedError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(body, media_type="application/json")


async def _events(
    first: Delta,
    deltas: AsyncGenerator[Delta, None],
    job: Job,
    answer: Answer,
    state: ServerState,
    generation: Generation,
) -> AsyncGenerator[bytes, None]:
    """Chunks, usage where asked for, [DONE]; or after a failure one error event and nothing more."""
    inline = _inline_bytes(job)
    async with contextlib.aclosing(deltas):
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


async def _with_first(first: Delta, rest: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    yield first
    async for delta in rest:
        yield delta


def _inline_bytes(job: Job) -> int:
    logits = job.body.return_logits
    return INLINE_LIST_BYTES if logits is not None and logits.wire_encoding == "list" else INLINE_BASE64_BYTES
