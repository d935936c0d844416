"""The HTTP response of a job: sent as the job runs or when it is done, ended when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Coroutine, Iterable
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Message, Receive, Scope, Send

from logitserve.answers.answer import Answer, Piece
from logitserve.answers.json_pieces import joined
from logitserve.answers.sending.outlet import Outlet
from logitserve.answers.sending.time_limit import TimeLimit
from logitserve.errors import ApiError, from_exception
from logitserve.held_bytes import AnswerBytes
from logitserve.jobs.job import Job
from logitserve.jobs.limits import answer_too_large
from logitserve.jobs.run import RunningJob
from logitserve.state import ServerState
from logitserve.telemetry.record import RequestRecord
from logitserve.text.choice import Delta

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOGPROBS_WEIGHT = 16
"""Time to write a byte of log-probabilities, in terms of a byte of rows."""

ENCODED_PER_BYTE = 2
"""Bytes reserved for each byte of a delta, before its written length is known."""

CLIENT_CLOSED_REQUEST = 499
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class ClientDisconnectedError(Exception):
    """The client went away before the answer ended."""


def respond(job: Job, answer: Answer, state: ServerState, request: Request) -> Response:
    """Return the response that runs the job and sends the answer.

    The response raises EngineError or ApiError while nothing has been sent.
    """
    record = RequestRecord.of(request.scope)
    record.answer_id = answer.id
    return AnswerResponse(job, RunningJob(job, state, record), answer, state, record)


class AnswerResponse(Response):
    """Runs a job while its client waits, and sends its answer's pieces as they come.

    The next delta is requested when the pieces of the last one have left, so a slow reader slows its own
    request. A failure after the head is reported by ``Answer.tell``. Where an answer cannot report one, its
    body is left without an end, so that the client's HTTP library sees the truncation.
    """

    def __init__(
        self, job: Job, running: RunningJob, answer: Answer, state: ServerState, record: RequestRecord
    ) -> None:
        super().__init__(media_type=answer.media_type, headers=STREAM_HEADERS if job.answer.stream else None)
        del self.headers["Content-Length"]  # Starlette's own, of an empty body
        self._job = job
        self._running = running
        self._answer = answer
        self._state = state
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        config, answer = self._state.config, self._answer
        if self._job.answer.stream:
            outlet = Outlet(send, self._head, config.ping_interval, answer.fill_silence)
            work = self._stream(outlet, scope)
        else:
            outlet = Outlet(send, self._head)
            work = self._send_whole(outlet)
        try:
            await until_disconnect(receive, work)
        except ClientDisconnectedError:
            self._record.has_left = True
            if not outlet.has_begun:
                await Response(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, send)

    def _head(self) -> Message:
        return {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}

    async def _stream(self, outlet: Outlet, scope: Scope) -> None:
        async with outlet:
            try:
                with TimeLimit(self._state.config.request_timeout, outlet):
                    await self._send_deltas(outlet)
            except Exception as error:
                if not outlet.has_begun:
                    raise
                await self._tell(from_exception(error, scope), outlet)
                return
            await outlet.close()

    async def _send_deltas(self, outlet: Outlet) -> None:
        async with contextlib.aclosing(self._running.deltas()) as deltas:
            async for delta in deltas:
                for piece in await self._add(delta):
                    await outlet.write(piece)
        for piece in self._answer.end(self._running.counts):
            await outlet.write(piece)

    async def _tell(self, error: ApiError, outlet: Outlet) -> None:
        self._record.failure = error
        if not self._answer.tells_errors:
            logger.warning("a stream was cut off: %s", error, extra=self._record.names())
            return
        for piece in self._answer.tell(error):
            await outlet.write(piece)
        await outlet.close()

    async def _send_whole(self, outlet: Outlet) -> None:
        """Send the body once it is complete.

        Its bytes are charged to the server's budget until they are sent.
        """
        state, answer = self._state, self._answer
        with state.held_bytes.answer() as held:
            with TimeLimit(state.config.request_timeout, outlet):
                await self._collect(held)
                end = partial(answer.end, self._running.counts)
                pieces = deque(await state.encode(end, answer.nbytes, answer.inline_bytes))
            num_bytes = sum(map(len, pieces))
            self.headers["Content-Length"] = str(num_bytes)
            for piece in joined(pieces):
                await outlet.write(piece)
                num_bytes -= len(piece)
                held.settle(num_bytes)
            await outlet.close()

    async def _collect(self, held: AnswerBytes) -> None:
        """Hand every delta to the answer as the budget has room."""
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
            return answer.add(delta, self._running.counts)
        return await self._state.encode(
            partial(answer.add, delta, self._running.counts), cost, answer.inline_bytes
        )

    def _check_size(self, nbytes: int) -> None:
        if nbytes > self._state.config.max_answer_bytes:
            raise answer_too_large(self._job.rows_param, f"{nbytes} bytes and more", self._state.config)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return ``work``'s result. If the client goes away first, the work is cancelled and awaited.

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
