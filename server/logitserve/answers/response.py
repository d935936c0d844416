"""A job to an HTTP response: run, answered as it goes or when it is done, aborted when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Iterable
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from logitengine.errors import EngineError
from starlette.types import Receive, Scope, Send

from logitserve.answers.answer import Answer, Piece
from logitserve.answers.json_pieces import joined
from logitserve.errors import ApiError, from_exception
from logitserve.held_bytes import AnswerBytes
from logitserve.http.middleware.request_log import LogFields
from logitserve.jobs.job import Job
from logitserve.jobs.limits import answer_too_large
from logitserve.jobs.run import RunningJob
from logitserve.state import ServerState
from logitserve.text.choice import Delta

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOGPROBS_WEIGHT = 16
"""How much longer a byte of log-probabilities takes to write than a byte of rows."""

ENCODED_PER_BYTE = 2
"""Bytes reserved for each byte of a delta, before it is known how long it is when written."""

CLIENT_CLOSED_REQUEST = 499
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class ClientDisconnectedError(Exception):
    """Nobody waits for the answer any more."""


async def respond(job: Job, answer: Answer, state: ServerState, request: Request) -> Response:
    """Run the job and answer. Raises EngineError or ApiError while nothing has been sent."""
    running = RunningJob(job, state.engine, state.held_bytes)
    fields = LogFields.of(request.scope)
    fields.answer_id, fields.counts = answer.id, running.counts
    body = _Body(job, running, answer, state)
    pieces = body.streamed() if job.answer.stream else body.whole()

    async def begin() -> Piece:
        return await anext(pieces)

    try:
        first = await until_disconnect(request.receive, begin())
    except ClientDisconnectedError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return PiecesResponse(first, pieces, answer.media_type, body.headers)


class _Body:
    """The pieces of one response's body. ``headers`` are its own by the time the first piece is there."""

    def __init__(self, job: Job, running: RunningJob, answer: Answer, state: ServerState) -> None:
        self._job = job
        self._running = running
        self._answer = answer
        self._state = state
        self.headers: dict[str, str] = {}

    async def streamed(self) -> AsyncGenerator[Piece, None]:
        """Each delta's pieces as they come. A failure after the first one is told in the answer's own way.

        The next delta is asked for when the pieces of this one have left, so a slow reader slows its own request.
        """
        self.headers.update(STREAM_HEADERS)
        answer, has_begun = self._answer, False
        try:
            async with contextlib.aclosing(self._running.deltas()) as deltas:
                async for delta in deltas:
                    for piece in await self._add(delta):
                        yield piece
                        has_begun = True
            for piece in answer.end(self._running.counts):
                yield piece
        except Exception as error:
            if not (has_begun and answer.tells_errors):
                raise
            for piece in answer.tell(from_exception(error)):
                yield piece

    async def whole(self) -> AsyncGenerator[Piece, None]:
        """The body once all of it is there. What it holds is charged to the server's budget until it is sent."""
        state, answer = self._state, self._answer
        with state.held_bytes.answer() as held:
            await self._collect(held)
            end = partial(answer.end, self._running.counts)
            pieces = deque(await state.encode(end, answer.nbytes, answer.inline_bytes))
            num_bytes = sum(map(len, pieces))
            self.headers["Content-Length"] = str(num_bytes)
            for piece in joined(pieces):
                yield piece
                num_bytes -= len(piece)
                held.settle(num_bytes)

    async def _collect(self, held: AnswerBytes) -> None:
        """Hand every delta to the answer, as the budget has room."""
        answer = self._answer
        async with contextlib.aclosing(self._running.deltas()) as deltas:
            async for delta in deltas:
                await held.reserve(ENCODED_PER_BYTE * delta.nbytes)
                await self._add(delta)
                held.settle(answer.nbytes)
                self._check_size(answer.nbytes)

    async def _add(self, delta: Delta) -> Iterable[Piece]:
        """Hand the delta to the answer, on a thread where writing it would hold up the event loop."""
        answer = self._answer
        cost = delta.nbytes + LOGPROBS_WEIGHT * delta.logprobs_nbytes
        if cost <= answer.inline_bytes:
            return answer.add(delta)
        return await self._state.encode(partial(answer.add, delta), cost, answer.inline_bytes)

    def _check_size(self, nbytes: int) -> None:
        if nbytes > self._state.config.max_answer_bytes:
            raise answer_too_large(self._job.rows_param, f"{nbytes} bytes and more", self._state.config)


class PiecesResponse(Response):
    """Sends pieces as they come, and waits while the client does not read.

    ``pieces`` is closed however it ends. A failure leaves the body without its end, so that the client's HTTP library sees
    that it is not whole.
    """

    def __init__(
        self, first: Piece, pieces: AsyncGenerator[Piece, None], media_type: str, headers: dict[str, str]
    ) -> None:
        super().__init__(media_type=media_type, headers=headers)
        if "Content-Length" not in headers:
            del self.headers["Content-Length"]  # Starlette's, of a body that it does not know
        self._first: Piece | None = first
        self._pieces = pieces

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._pieces):
            with contextlib.suppress(ClientDisconnectedError):
                await until_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for piece in self._with_first():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except (EngineError, ApiError) as error:
            logger.warning("a stream was cut off: %s", error)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _with_first(self) -> AsyncGenerator[Piece, None]:
        first, self._first = self._first, None
        if first is not None:
            yield first
        del first
        async for piece in self._pieces:
            yield piece


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """``work``'s result; it is cancelled, and has ended, when the client goes away first.

    Raises ClientDisconnectedError. The request's body must have been read.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnectedError
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
