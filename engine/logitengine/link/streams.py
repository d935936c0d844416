"""The requests under way, multiplexed over the channel to the engine process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from logitengine.errors import (
    EngineDeadError,
    EngineError,
    EngineNotReadyError,
    EngineOverloadedError,
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
"""Of a request's window, how much is read before the engine is told: each telling wakes a thread beside its kernels."""


class _Stream:
    """The outputs of one request on their way from the socket to the one who asked."""

    def __init__(self, n: int, channel: AsyncChannel[FromEngine]) -> None:
        self.channel = channel
        self.open_choices = set(range(n))
        self.aborted_choices: set[int] = set()
        self.queue: asyncio.Queue[StepOutput | EngineError | None] = asyncio.Queue()

    def put(self, output: StepOutput) -> None:
        if output.index not in self.open_choices:
            return
        self.queue.put_nowait(output)
        if output.finish_reason is not None:
            self.close_choice(output.index)

    def close_choice(self, index: int) -> None:
        self.open_choices.discard(index)
        if not self.open_choices:
            self.queue.put_nowait(None)

    def fail(self, error: EngineError) -> None:
        self.open_choices.clear()
        self.queue.put_nowait(error)


class Streams:
    """Sends requests to the process that is connected and hands its outputs to those who asked.

    Args:
        window_bytes: how much of a request's outputs may be unread before the engine makes no more.
    """

    def __init__(self, window_bytes: int) -> None:
        self._acknowledged_bytes = window_bytes * ACKNOWLEDGED_SHARE
        self._streams: dict[str, _Stream] = {}
        self._channel: AsyncChannel[FromEngine] | None = None
        self._reason = "not started"

    # What becomes of the process.

    def connect(self, channel: AsyncChannel[FromEngine]) -> None:
        """Send requests over ``channel`` from here on: its process is ready."""
        self._channel = channel

    def disconnect(self, reason: str) -> None:
        """Fail every request and turn new ones away with ``reason``: no process takes them."""
        self._channel, self._reason = None, reason
        for stream in self._streams.values():
            stream.fail(EngineDeadError("the engine died while it was working on this request"))

    def receive(self, message: StepOutputs | Refused) -> None:
        """Hand on what the connected process said."""
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

    # What is asked of it.

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[StepOutput, None]:
        """As `EngineProtocol.generate`."""
        channel = self._channel
        if channel is None:
            raise EngineNotReadyError(self._reason)
        if request.request_id in self._streams:
            raise RequestRefusedError(f"request id {request.request_id!r} is in use")
        stream = self._streams[request.request_id] = _Stream(request.n, channel)
        channel.send(Generate(request))
        consumed = 0
        try:
            while (output := await stream.queue.get()) is not None:
                if isinstance(output, EngineError):
                    raise output
                if output.index not in stream.aborted_choices:
                    yield output
                consumed += output.nbytes
                if consumed >= self._acknowledged_bytes:
                    channel.send(Consumed(request.request_id, consumed))
                    consumed = 0
        finally:
            del self._streams[request.request_id]
            if stream.open_choices:
                channel.send(Abort(request.request_id))

    def abort_choice(self, request_id: str, index: int) -> None:
        """As `EngineProtocol.abort_choice`."""
        stream = self._streams.get(request_id)
        if stream is not None and index in stream.open_choices:
            stream.channel.send(Abort(request_id, index))
            stream.aborted_choices.add(index)
            stream.close_choice(index)
