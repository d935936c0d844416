"""The engine's outputs for several requests as one stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Sequence

from logitengine.errors import EngineOverloadedError
from logitengine.link.engine_protocol import EngineProtocol
from logitengine.link.messages import GenerationRequest, StepOutput

HELD_BYTES = 64 << 20
"""Requests run side by side as long as their answers' rows stay under this together; two always do."""

MOST_SEQUENCES = 512
"""Sequences of one job in the engine at a time: many times what computes there, and half of what waits by default."""

RETRY_SECONDS = 0.1
"""Pause before an engine is asked again whose queue others have filled."""


async def outputs_of(
    engine: EngineProtocol, requests: Sequence[GenerationRequest], largest_nbytes: int
) -> AsyncGenerator[tuple[int, StepOutput], None]:
    """Every request's outputs as they come, each with its request's number. Raises EngineError.

    ``largest_nbytes`` bounds the rows of any one answer. An output counts against its request's window until the next
    one is asked for, so a slow reader holds at most a window of each request that has begun. Closing the stream aborts
    what still runs. A queue that is full refuses the job only while none of its requests has been taken.
    """
    if len(requests) == 1:
        async with contextlib.aclosing(engine.generate(requests[0])) as stream:
            async for output in stream:
                yield 0, output
        return
    most = min(HELD_BYTES // max(1, largest_nbytes), MOST_SEQUENCES // max(request.n for request in requests))
    interleaved = _Interleaving(engine, requests, most=max(2, most))
    async with contextlib.aclosing(interleaved.outputs()) as outputs:
        async for numbered in outputs:
            yield numbered


class _Interleaving:
    """Requests that run side by side, ``most`` of them at a time, or fewer where the engine's queue has no room."""

    def __init__(self, engine: EngineProtocol, requests: Sequence[GenerationRequest], most: int) -> None:
        self._engine = engine
        self._requests = requests
        self._most = most
        self._room = most
        self._has_begun = False
        self._unstarted = deque(range(len(requests)))
        self._streams: dict[int, AsyncGenerator[StepOutput, None]] = {}
        self._calls: dict[asyncio.Future[StepOutput], int] = {}

    async def outputs(self) -> AsyncGenerator[tuple[int, StepOutput], None]:
        """Outputs with their requests' numbers, the next request started when one ends. Holds one output of each back."""
        try:
            while self._calls or self._unstarted:
                if not self._room:
                    # Nothing of the job is left that could end and make room.
                    await asyncio.sleep(RETRY_SECONDS)
                    self._room = 1
                self._start()
                done, _ = await asyncio.wait(self._calls, return_when=asyncio.FIRST_COMPLETED)
                for call in done:
                    number = self._calls.pop(call)
                    try:
                        output = call.result()
                    except StopAsyncIteration:
                        self._on_end(number)
                    except EngineOverloadedError:
                        self._on_refusal(number)
                        if not self._streams and not self._has_begun:
                            raise
                    else:
                        self._has_begun = True
                        yield number, output
                        self._ask(number)
        finally:
            for call in self._calls:
                call.cancel()
            await asyncio.gather(*self._calls, return_exceptions=True)
            for stream in self._streams.values():
                await stream.aclose()

    def _start(self) -> None:
        while self._unstarted and len(self._streams) < self._room:
            number = self._unstarted.popleft()
            self._streams[number] = self._engine.generate(self._requests[number])
            self._ask(number)

    def _ask(self, number: int) -> None:
        self._calls[asyncio.ensure_future(anext(self._streams[number]))] = number

    def _on_end(self, number: int) -> None:
        """There is room for the next one, and perhaps for one more."""
        self._has_begun = True
        del self._streams[number]
        self._room = min(self._most, self._room + 1)

    def _on_refusal(self, number: int) -> None:
        """The request is started again when another one ends."""
        del self._streams[number]
        self._unstarted.appendleft(number)
        self._room = len(self._streams)
