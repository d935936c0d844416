"""Requests in progress, multiplexed over the channel to the engine process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection

from logitengine.errors import (
    EngineDeadError,
    EngineError,
    EngineNotReadyError,
    EngineOverloadedError,
    RequestFatalError,
    RequestRefusedError,
)
from logitengine.link.channel import AsyncChannel
from logitengine.link.messages import (
    Abort,
    Consumed,
    FromEngine,
    Generate,
    GenerationRequest,
    Refused,
    StepOutput,
    StepOutputs,
)

ACKNOWLEDGED_SHARE = 1 / 8
"""Share of a request's window that is read per message to the engine, which wakes a thread beside its kernels."""

MOST_PROCESSES = 2
"""Number of processes that get a request in turn. A request that kills each process early must not do so for ever."""


class _Stream:
    """Outputs of one request on their way from the socket to the caller.

    Every output is consumed once: when its reader is done with it, or at once if it has no reader. The engine
    counts unconsumed bytes against the request's window.
    """

    def __init__(self, request: GenerationRequest, window_bytes: int) -> None:
        self._request = request
        self._acknowledged_bytes = (
            min(window_bytes, request.window_bytes or window_bytes) * ACKNOWLEDGED_SHARE
        )
        self._channel: AsyncChannel[FromEngine] | None = None
        self._num_sent = 0
        self._has_output = False
        self._open_choices = set(range(request.n))
        self._aborted_choices: set[int] = set()
        self._consumed = 0
        self._queue: asyncio.Queue[StepOutput | EngineError | None] = asyncio.Queue()

    def send(self, channel: AsyncChannel[FromEngine]) -> None:
        """Send the request to the process behind ``channel``, unless it was sent before or is over."""
        if self._channel is not None or not self._open_choices:
            return
        self._channel = channel
        self._num_sent += 1
        channel.send(Generate(self._request))
        for index in self._aborted_choices:
            channel.send(Abort(self._request.request_id, index))

    def disconnect(self, begun: Collection[str]) -> None:
        """Detach from a process that ended, to be sent to the next one, or fail where that cannot continue the request."""
        self._channel = None
        was_begun = self._request.request_id in begun
        if self._has_output or self._num_sent < MOST_PROCESSES:
            if self._has_output or was_begun:
                self.fail(EngineDeadError("the engine died while it was working on this request"))
        elif was_begun or not begun:
            self.fail(RequestFatalError(f"the engine died {self._num_sent} times in turn with this request"))
        else:
            self.fail(
                EngineDeadError(f"the engine died {self._num_sent} times before it had begun this request")
            )

    def put(self, output: StepOutput) -> None:
        """Take an output from the engine; an aborted choice has no reader."""
        self._has_output = True
        if output.index not in self._open_choices:
            self.consume(output)
            return
        self._queue.put_nowait(output)
        if output.finish_reason is not None:
            self._close_choice(output.index)

    async def next(self) -> StepOutput | None:
        """Return the next output to read and then `consume`, or None after the last. Raises EngineError."""
        while (output := await self._queue.get()) is not None:
            if isinstance(output, EngineError):
                raise output
            if output.index not in self._aborted_choices:
                return output
            self.consume(output)
        return None

    def consume(self, output: StepOutput) -> None:
        self._consumed += output.nbytes
        if self._consumed >= self._acknowledged_bytes:
            self._tell(Consumed(self._request.request_id, self._consumed))
            self._consumed = 0

    def abort(self, index: int) -> None:
        if index in self._open_choices:
            self._tell(Abort(self._request.request_id, index))
            self._aborted_choices.add(index)
            self._close_choice(index)

    def close(self) -> None:
        """Abort the choices that still run, because the reader is gone."""
        if self._open_choices:
            self._tell(Abort(self._request.request_id))

    def fail(self, error: EngineError) -> None:
        self._open_choices.clear()
        self._queue.put_nowait(error)

    def _tell(self, message: Abort | Consumed) -> None:
        if self._channel is not None:
            self._channel.send(message)

    def _close_choice(self, index: int) -> None:
        self._open_choices.discard(index)
        if not self._open_choices:
            self._queue.put_nowait(None)


class Streams:
    """Sends requests to the connected process and passes its outputs to the callers.

    Args:
        window_bytes: bytes of a request's outputs that may be unread before the engine stops producing more.
    """

    def __init__(self, window_bytes: int) -> None:
        self._window_bytes = window_bytes
        self._streams: dict[str, _Stream] = {}
        self._channel: AsyncChannel[FromEngine] | None = None
        self._refusal: str | None = "not started"

    def connect(self, channel: AsyncChannel[FromEngine]) -> None:
        """Send requests over ``channel`` to a ready process, first the ones that waited for it."""
        self._channel, self._refusal = channel, None
        for stream in self._streams.values():
            stream.send(channel)

    def disconnect(self, begun: Collection[str] = ()) -> None:
        """Let requests wait for the next process, because this one has ended. Newcomers wait with them.

        Those of which something was delivered fail, and those that the process says it had ``begun``: they may
        be why it ended.
        """
        self._channel, self._refusal = None, None
        for stream in self._streams.values():
            stream.disconnect(begun)

    def end(self, reason: str) -> None:
        """Reject new requests with ``reason``, and fail those in progress: no process comes for them."""
        self._channel, self._refusal = None, reason
        for stream in self._streams.values():
            stream.fail(EngineDeadError(f"the request was not finished: {reason}"))

    def receive(self, message: StepOutputs | Refused) -> None:
        """Pass on a message of the connected process."""
        match message:
            case StepOutputs(outputs):
                for output in outputs:
                    stream = self._streams.get(output.request_id)
                    if stream is not None:
                        stream.put(output)
            case Refused(request_id, reason, overloaded):
                stream = self._streams.get(request_id)
                if stream is not None:
                    refusal = EngineOverloadedError if overloaded else RequestRefusedError
                    stream.fail(refusal(reason))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[StepOutput, None]:
        """Implement `EngineProtocol.generate`."""
        if self._refusal is not None:
            raise EngineNotReadyError(self._refusal)
        if request.request_id in self._streams:
            raise RequestRefusedError(f"request id {request.request_id!r} is in use")
        stream = self._streams[request.request_id] = _Stream(request, self._window_bytes)
        if self._channel is not None:
            stream.send(self._channel)
        try:
            while (output := await stream.next()) is not None:
                yield output
                stream.consume(output)
        finally:
            del self._streams[request.request_id]
            stream.close()

    def abort_choice(self, request_id: str, index: int) -> None:
        """Implement `EngineProtocol.abort_choice`."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.abort(index)
