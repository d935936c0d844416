"""Requests in progress, seen from the engine's end of the socket, which these tests play."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest
from logitengine.errors import EngineNotReadyError
from logitengine.link.channel import AsyncChannel, BlockingChannel
from logitengine.link.messages import (
    Abort,
    Array,
    Consumed,
    EngineStats,
    FromEngine,
    Generate,
    GenerationRequest,
    LogitsRows,
    SamplingParams,
    StepOutput,
    StepOutputs,
    ToEngine,
)
from logitengine.link.streams import Streams
from support import greedy

pytestmark = pytest.mark.anyio

WINDOW = 1 << 16
ROW_BYTES = WINDOW // 4


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class PlayedEngine:
    """The other end of the socket."""

    def __init__(self, channel: BlockingChannel[ToEngine]) -> None:
        self._channel = channel

    async def receive(self) -> ToEngine:
        async with asyncio.timeout(30):
            message = await asyncio.to_thread(self._channel.receive)
        assert message is not None
        return message

    def send(self, *outputs: StepOutput) -> None:
        self._channel.send(StepOutputs(list(outputs), EngineStats()))


@asynccontextmanager
async def connected(streams: Streams) -> AsyncIterator[PlayedEngine]:
    left, right = socket.socketpair()
    engine: BlockingChannel[ToEngine] = BlockingChannel(left, ToEngine)

    def receive(message: FromEngine) -> None:
        assert isinstance(message, StepOutputs)
        streams.receive(message)

    channel = await AsyncChannel.over(right, FromEngine, receive)
    streams.connect(channel)
    try:
        yield PlayedEngine(engine)
    finally:
        channel.close()
        await channel.wait_closed()
        engine.flush(timeout=10)
        engine.close()


def row(request_id: str, index: int, *, last: bool = False) -> StepOutput:
    """Return an output of one token with ROW_BYTES of logits."""
    return StepOutput(
        request_id=request_id,
        index=index,
        token_ids=[7],
        logits=LogitsRows(values=Array("float32", (1, ROW_BYTES // 4), bytes(ROW_BYTES))),
        finish_reason="length" if last else None,
    )


def choices(request_id: str, n: int) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id, prompt_token_ids=[1], n=n, sampling=SamplingParams(max_tokens=100)
    )


async def test_rows_of_an_aborted_choice_do_not_stay_in_the_window() -> None:
    """The rows arrive after the abort, and nobody reads them."""
    streams = Streams(WINDOW)
    async with connected(streams) as engine, aclosing(streams.generate(choices("a", 2))) as outputs:
        first = asyncio.ensure_future(anext(outputs))
        assert isinstance(await engine.receive(), Generate)
        engine.send(row("a", 0))
        await first
        streams.abort_choice("a", 1)
        assert await engine.receive() == Abort("a", 1)
        engine.send(row("a", 1), row("a", 1), row("a", 1, last=True))
        engine.send(row("a", 0, last=True))
        assert [output.index async for output in outputs] == [0]
        acknowledged = 0
        while acknowledged < 5 * ROW_BYTES:
            message = await engine.receive()
            assert isinstance(message, Consumed)
            acknowledged += message.nbytes
        assert acknowledged == 5 * ROW_BYTES


async def test_rows_of_an_aborted_choice_are_counted_while_the_reader_of_another_lags() -> None:
    streams = Streams(WINDOW)
    async with connected(streams) as engine, aclosing(streams.generate(choices("a", 2))) as outputs:
        first = asyncio.ensure_future(anext(outputs))
        assert isinstance(await engine.receive(), Generate)
        engine.send(row("a", 0))
        await first
        streams.abort_choice("a", 1)
        assert await engine.receive() == Abort("a", 1)
        engine.send(row("a", 1))
        assert await engine.receive() == Consumed("a", ROW_BYTES), "the row of choice 0 is still being read"


async def test_small_outputs_are_acknowledged_together() -> None:
    """There is no message for each, and all of their bytes are acknowledged."""
    streams = Streams(WINDOW)
    small = StepOutput(
        request_id="a",
        index=0,
        token_ids=[7],
        logits=LogitsRows(values=Array("float32", (1, 256), bytes(1024))),
    )
    async with connected(streams) as engine, aclosing(streams.generate(greedy("a", [1], 100))) as outputs:
        reading = asyncio.ensure_future(anext(outputs))
        assert isinstance(await engine.receive(), Generate)
        for _ in range(8):
            engine.send(small)
            await reading
            reading = asyncio.ensure_future(anext(outputs))
        assert await engine.receive() == Consumed("a", WINDOW // 8)
        engine.send(row("a", 0, last=True))
        await reading


async def test_a_request_is_turned_away_with_the_reason_where_no_process_will_come() -> None:
    streams = Streams(WINDOW)
    streams.end("gone for lunch")
    with pytest.raises(EngineNotReadyError, match="gone for lunch"):
        await anext(streams.generate(choices("a", 1)))


async def test_a_request_between_two_processes_is_sent_to_the_next_one() -> None:
    streams = Streams(WINDOW)
    streams.disconnect()
    async with aclosing(streams.generate(choices("a", 1))) as outputs:
        first = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(0)
        async with connected(streams) as engine:
            message = await engine.receive()
            assert isinstance(message, Generate)
            engine.send(row("a", 0, last=True))
            assert (await first).token_ids == [7]


async def test_a_client_that_leaves_while_its_request_waits_costs_the_next_process_nothing() -> None:
    streams = Streams(WINDOW)
    streams.disconnect()
    left = asyncio.ensure_future(anext(streams.generate(choices("left", 1))))
    async with aclosing(streams.generate(choices("stays", 1))) as outputs:
        first = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        async with connected(streams) as engine:
            message = await engine.receive()
            assert isinstance(message, Generate)
            assert message.request.request_id == "stays"
            engine.send(row("stays", 0, last=True))
            await first
