"""What goes into the socket comes out of it, and what is no message is refused."""

from __future__ import annotations

import socket
import struct
import threading

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from logitengine.messages import (
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
from logitengine.transport import AsyncChannel, BlockingChannel, TransportError, encode

UNKNOWN = msgspec.msgpack.encode({"type": "Exec", "code": "import os"})


def round_trip(message: object, types: object) -> object:
    left, right = socket.socketpair()
    sender: BlockingChannel[object] = BlockingChannel(left, types)
    receiver: BlockingChannel[object] = BlockingChannel(right, types)
    sending = threading.Thread(target=sender.send, args=(message,))
    sending.start()
    try:
        return receiver.receive()
    finally:
        sending.join()
        sender.close()
        receiver.close()


@given(st.lists(st.one_of(st.integers(0, 10_000), st.integers(0, 300_000)), max_size=5))
def test_arrays_arrive_as_they_were(sizes: list[int]) -> None:
    payloads = [(bytes(range(251)) * (size // 251 + 1))[:size] for size in sizes]
    outputs = [
        StepOutput(
            request_id=str(i),
            index=i,
            token_ids=[i],
            logits=LogitsRows(values=Array("float16", (1, len(payload)), payload)),
        )
        for i, payload in enumerate(payloads)
    ]
    received = round_trip(StepOutputs(outputs, EngineStats(num_steps=3)), FromEngine)
    assert isinstance(received, StepOutputs)
    assert received.stats.num_steps == 3
    for output, payload in zip(received.outputs, payloads, strict=True):
        assert output.logits is not None
        assert bytes(output.logits.values.data) == payload
        assert output.logits.values.shape == (1, len(payload))
        assert output.nbytes == len(payload)


@pytest.mark.parametrize(
    "message",
    [
        Generate(
            GenerationRequest(request_id="a", prompt_token_ids=[1], sampling=SamplingParams(max_tokens=1))
        ),
        Abort("a", 2),
        Consumed("a", 1 << 40),
    ],
)
def test_commands_arrive_as_they_were(message: object) -> None:
    assert round_trip(message, ToEngine) == message


def test_a_closed_socket_ends_the_conversation() -> None:
    left, right = socket.socketpair()
    left.close()
    receiver: BlockingChannel[ToEngine] = BlockingChannel(right, ToEngine)
    assert receiver.receive() is None
    receiver.close()


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("<IQ", 1 << 30, 1),
        struct.pack("<IQ", 0, 1 << 60),
        struct.pack("<IQQ", 1, 1, 1 << 60) + b"\xc0",
        struct.pack("<IQ", 0, 3) + b"\xc1\xc1\xc1",
        struct.pack("<IQ", 0, len(UNKNOWN)) + UNKNOWN,
    ],
    ids=["many-arrays", "huge-message", "huge-array", "garbage", "unknown-type"],
)
def test_what_is_no_message_is_refused(raw: bytes) -> None:
    left, right = socket.socketpair()
    left.sendall(raw)
    left.close()
    receiver: BlockingChannel[ToEngine] = BlockingChannel(right, ToEngine)
    with pytest.raises(TransportError):
        receiver.receive()
    receiver.close()


@pytest.mark.anyio
async def test_the_two_ends_understand_each_other() -> None:
    left, right = socket.socketpair()
    engine: BlockingChannel[ToEngine] = BlockingChannel(left, ToEngine)
    server: AsyncChannel[FromEngine] = AsyncChannel(right, FromEngine)
    await server.send(Abort("a"))
    assert engine.receive() == Abort("a")
    rows = LogitsRows(values=Array("float32", (1, 2), b"12345678"))
    engine.send(StepOutputs([StepOutput(request_id="a", index=0, logits=rows)], EngineStats()))
    received = await server.receive()
    assert isinstance(received, StepOutputs)
    assert received.outputs[0].nbytes == 8
    engine.close()
    assert await server.receive() is None
    server.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_large_arrays_are_not_copied_into_the_message() -> None:
    row = b"x" * 200_000
    rows = LogitsRows(values=Array("float32", (1, 50_000), row))
    message = StepOutputs([StepOutput(request_id="a", index=0, logits=rows)], EngineStats())
    head, array = encode(message)
    assert array is row
    assert len(head) < 1000
    received = round_trip(message, FromEngine)
    assert isinstance(received, StepOutputs)
    assert received.outputs[0].logits is not None
    assert bytes(received.outputs[0].logits.values.data) == row
