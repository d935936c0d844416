"""The engine's outputs for several requests as one stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from itertools import islice

from logitengine.link.engine_protocol import EngineProtocol
from logitengine.link.messages import GenerationRequest, StepOutput

HELD_BYTES = 64 << 20
"""Requests run side by side as long as their answers' rows stay under this together; two always do."""


async def outputs_of(
    engine: EngineProtocol, requests: Sequence[GenerationRequest], largest_nbytes: int
) -> AsyncGenerator[tuple[int, StepOutput], None]:
    """Every request's outputs as they come, each with its request's number. Raises EngineError.

    ``largest_nbytes`` bounds the rows of any one answer. An output counts against its request's window until the next
    one is asked for, so a slow reader holds at most a window of each request that has begun. Closing the stream aborts
    what still runs.
    """
    streams = [engine.generate(request) for request in requests]
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as stream:
            async for output in stream:
                yield 0, output
        return
    interleaved = _interleaved(streams, at_once=max(2, HELD_BYTES // max(1, largest_nbytes)))
    async with contextlib.aclosing(interleaved):
        async for numbered in interleaved:
            yield numbered


async def _interleaved(
    streams: list[AsyncGenerator[StepOutput, None]], at_once: int
) -> AsyncGenerator[tuple[int, StepOutput], None]:
    """Outputs of ``at_once`` streams at a time, the next begun when one ends. Holds one output of each back."""
    unstarted = iter(range(len(streams)))
    waiting: dict[asyncio.Future[StepOutput], int] = {}

    def ask(number: int) -> None:
        waiting[asyncio.ensure_future(anext(streams[number]))] = number

    for number in islice(unstarted, at_once):
        ask(number)
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for call in done:
                number = waiting.pop(call)
                try:
                    output = call.result()
                except StopAsyncIteration:
                    for following in islice(unstarted, 1):
                        ask(following)
                    continue
                yield number, output
                ask(number)
    finally:
        for call in waiting:
            call.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
