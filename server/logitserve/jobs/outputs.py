"""The engine's outputs for several requests as one stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Sequence

from logitengine.errors import EngineOverloadedError
from logitengine.link.engine_protocol import EngineProtocol
from logitengine.link.messages import GenerationRequest, StepOutput
from msgspec.structs import replace

from logitserve.errors import BadRequestError
from logitserve.held_bytes import HeldBytes
from logitserve.jobs.limits import RowBytes

HELD_BYTES = 64 << 20
"""Requests run side by side as long as their answers' rows stay under this together; two always do."""

MOST_SEQUENCES = 512
"""Sequences of one job in the engine at a time: far more than a step computes, half of the default queue."""

WINDOW_BYTES = 16 << 20
WINDOW_STEPS = 64
"""Largest size of a window, in bytes and in steps of decoding. A larger window makes no request faster."""

RETRY_SECONDS = 0.1
"""Pause before another try at an engine whose queue others have filled."""

NumberedOutput = tuple[int, StepOutput]
"""The number of a request within its job, and one of its outputs."""


async def outputs_of(
    engine: EngineProtocol, requests: Sequence[GenerationRequest], row_bytes: RowBytes, held: HeldBytes
) -> AsyncGenerator[NumberedOutput, None]:
    """Yield every request's outputs as they come, each with its request's number. Raises EngineError.

    An output counts against its request's window until the next one is requested. So a slow reader holds at
    most a window of each request that has begun; ``held`` bounds the windows in all. Closing the stream
    aborts the requests that still run. A full queue, or a budget without room, refuses the job only while
    none of its requests has been taken.
    """
    if len(requests) == 1:
        async with contextlib.aclosing(_outputs(engine, requests[0], row_bytes, held)) as stream:
            async for output in stream:
                yield 0, output
        return
    async with contextlib.aclosing(_Interleaving(engine, requests, row_bytes, held).outputs()) as outputs:
        async for numbered in outputs:
            yield numbered


async def _outputs(
    engine: EngineProtocol,
    request: GenerationRequest,
    row_bytes: RowBytes,
    held: HeldBytes,
    *,
    is_owed: bool = False,
) -> AsyncGenerator[StepOutput, None]:
    """Yield one request's outputs, within a window of its own.

    Raises EngineError, and BadRequestError where no window fits.
    """
    step = request.n * row_bytes.position
    wanted = min(WINDOW_BYTES, row_bytes.request, max(held.small, WINDOW_STEPS * step))
    if not held.fits(min(step, wanted)):
        raise BadRequestError(f"A step's rows are {step} bytes, more than --max-held-bytes has room for.")
    window = held.window(wanted, step, is_owed=is_owed)
    if window is None:
        raise EngineOverloadedError("unread rows of other requests take up --max-held-bytes")
    try:
        # A window for all of the request's rows bounds nothing.
        bound = window.nbytes if window.nbytes < row_bytes.request else None
        windowed = replace(request, window_bytes=bound)
        async with contextlib.aclosing(engine.generate(windowed)) as stream:
            async for output in stream:
                yield output
    finally:
        window.close()


class _Interleaving:
    """Requests side by side, as many at a time as the bounds allow and the engine's queue has room for."""

    def __init__(
        self,
        engine: EngineProtocol,
        requests: Sequence[GenerationRequest],
        row_bytes: RowBytes,
        held: HeldBytes,
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._row_bytes = row_bytes
        self._held = held
        most_sequences = MOST_SEQUENCES // max(request.n for request in requests)
        self._most = max(2, min(HELD_BYTES // max(1, row_bytes.request), most_sequences))
        self._room = self._most
        self._has_begun = False
        self._unstarted = deque(range(len(requests)))
        self._streams: dict[int, AsyncGenerator[StepOutput, None]] = {}
        self._calls: dict[asyncio.Future[StepOutput], int] = {}

    async def outputs(self) -> AsyncGenerator[NumberedOutput, None]:
        """Yield outputs with their requests' numbers; the next request starts when one ends.

        One output of each is held back.
        """
        try:
            while self._calls or self._unstarted:
                if not self._room:
                    # No request of the job is left that could end and make room.
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
            # Others may wait for a job that has begun, so one of its requests always runs.
            is_owed = self._has_begun and not self._streams
            self._streams[number] = _outputs(
                self._engine, self._requests[number], self._row_bytes, self._held, is_owed=is_owed
            )
            self._ask(number)

    def _ask(self, number: int) -> None:
        self._calls[asyncio.ensure_future(anext(self._streams[number]))] = number

    def _on_end(self, number: int) -> None:
        """Make room for the next one, and perhaps for one more."""
        self._has_begun = True
        del self._streams[number]
        self._room = min(self._most, self._room + 1)

    def _on_refusal(self, number: int) -> None:
        """Start the request again when another one ends."""
        del self._streams[number]
        self._unstarted.appendleft(number)
        self._room = len(self._streams)
