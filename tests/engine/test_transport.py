"""Messages arrive as they were sent, and bytes that are not a message are refused."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from logitengine.link.channel import AsyncChannel, BlockingChannel, MessageReader, TransportError, encode
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

UNKNOWN = msgspec.msgpack.encode({"type": "Exec", "code": "import os"})


def round_trip(message: object, types: object) -> object:
    left, right = socket.socketpair()
    sender: BlockingChannel[object] = BlockingChannel(left, types)
    receiver: BlockingChannel[object] = BlockingChannel(right, types)
    sender.send(message)
    try:
        return receiver.receive()
    finally:
        sender.flush(timeout=10)
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


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


def output(index: int, nbytes: int) -> StepOutput:
    payload = bytes(range(1, 252)) * (nbytes // 251 + 1)
    rows = LogitsRows(values=Array("float16", (1, nbytes), payload[:nbytes]))
    return StepOutput(request_id="a", index=index, logits=rows)


def payloads(message: object) -> list[bytes]:
    assert isinstance(message, StepOutputs)
    return [bytes(output.logits.values.data) for output in message.outputs if output.logits is not None]


array_sizes = st.one_of(st.just(0), st.integers(0, 5000), st.integers(4096, 200_000))


@given(st.data(), st.lists(st.lists(array_sizes, max_size=3), min_size=1, max_size=4))
def test_messages_are_whole_wherever_the_reads_end(data: st.DataObject, messages: list[list[int]]) -> None:
    sent = [
        StepOutputs([output(i, nbytes) for i, nbytes in enumerate(sizes)], EngineStats(num_steps=step))
        for step, sizes in enumerate(messages)
    ]
    stream = b"".join(bytes(buffer) for message in sent for buffer in encode(message))
    reader: MessageReader[FromEngine] = MessageReader(FromEngine)
    received: list[FromEngine] = []
    at = 0
    while at < len(stream):
        space = reader.space()
        most = min(len(space), len(stream) - at)
        count = data.draw(st.one_of(st.just(most), st.integers(1, min(most, 40)), st.integers(1, most)))
        if len(stream) - at > 5000:
            count = max(count, most // 3)  # a few cuts are drawn, not thousands
        space[:count] = stream[at : at + count]
        at += count
        received.extend(reader.received(count))
    assert [payloads(message) for message in received] == [payloads(message) for message in sent]
    assert all(isinstance(message, StepOutputs) for message in received)


def test_a_message_larger_than_the_stage_is_followed_by_others() -> None:
    prompts = [list(range(40_000)), [1], list(range(30_000)), [2]]
    left, right = socket.socketpair()
    sender: BlockingChannel[object] = BlockingChannel(left, ToEngine)
    receiver: BlockingChannel[ToEngine] = BlockingChannel(right, ToEngine)
    for prompt in prompts:
        sampling = SamplingParams(max_tokens=1)
        sender.send(Generate(GenerationRequest(request_id="a", prompt_token_ids=prompt, sampling=sampling)))
    for prompt in prompts:
        received = receiver.receive()
        assert isinstance(received, Generate)
        assert received.request.prompt_token_ids == prompt
    sender.flush(timeout=10)
    sender.close()
    receiver.close()


def test_nobody_who_reads_holds_the_sender_up_or_changes_the_order() -> None:
    left, right = socket.socketpair()
    sender: BlockingChannel[object] = BlockingChannel(left, ToEngine)
    receiver: BlockingChannel[FromEngine] = BlockingChannel(right, FromEngine)
    sent = [StepOutputs([output(0, 300_000 * (step % 2))], EngineStats(num_steps=step)) for step in range(10)]
    for message in sent:
        sender.send(message)  # 1.5 MB, several times what the socket holds
    received = [receiver.receive() for _ in sent]
    assert [payloads(message) for message in received] == [payloads(message) for message in sent]
    sender.flush(timeout=10)
    sender.close()
    assert receiver.receive() is None
    receiver.close()


class HesitantSocket(socket.socket):
    """A socket whose first ``sendmsg`` sends what fits and returns only when told to."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(fileno=sock.detach())
        self.sent = threading.Event()
        self.may_return = threading.Event()

    def sendmsg(self, *arguments: Any) -> int:
        count = super().sendmsg(*arguments)
        if not self.sent.is_set():
            self.sent.set()
            self.may_return.wait()
        return count


def test_a_message_of_one_thread_is_not_cut_by_another_threads() -> None:
    left, right = socket.socketpair()
    sock = HesitantSocket(left)
    sender: BlockingChannel[object] = BlockingChannel(sock, ToEngine)
    receiver: BlockingChannel[FromEngine] = BlockingChannel(right, FromEngine)
    sent = [StepOutputs([output(0, nbytes)], EngineStats()) for nbytes in (1 << 20, 8)]
    threads = [threading.Thread(target=sender.send, args=(message,)) for message in sent]
    threads[0].start()
    sock.sent.wait()
    threads[1].start()
    threads[1].join(0.2)  # it may be done by then, if nothing prevents it from sending
    sock.may_return.set()
    received = [receiver.receive() for _ in sent]
    assert [payloads(message) for message in received] == [payloads(message) for message in sent]
    for thread in threads:
        thread.join()
    sender.flush(timeout=10)
    sender.close()
    receiver.close()


def test_sending_to_a_closed_socket_is_an_error() -> None:
    left, right = socket.socketpair()
    right.close()
    sender: BlockingChannel[object] = BlockingChannel(left, ToEngine)
    with pytest.raises(OSError, match="pipe"):
        sender.send(Abort("a"))
    sender.flush(timeout=10)
    sender.close()


@pytest.mark.anyio
async def test_the_two_ends_understand_each_other() -> None:
    left, right = socket.socketpair()
    engine: BlockingChannel[ToEngine] = BlockingChannel(left, ToEngine)
    arrived: asyncio.Queue[FromEngine] = asyncio.Queue()
    server = await AsyncChannel.over(right, FromEngine, arrived.put_nowait)
    server.send(Abort("a"))
    assert await asyncio.to_thread(engine.receive) == Abort("a")
    for nbytes in (8, 1 << 20, 8):
        engine.send(StepOutputs([output(0, nbytes)], EngineStats()))
        assert [len(payload) for payload in payloads(await arrived.get())] == [nbytes]
    engine.flush(timeout=10)
    engine.close()
    await server.wait_closed()
    server.send(Abort("a"))
    server.close()


@pytest.mark.anyio
async def test_what_is_no_message_ends_the_conversation() -> None:
    left, right = socket.socketpair()
    arrived: list[FromEngine] = []
    server = await AsyncChannel.over(right, FromEngine, arrived.append)
    left.sendall(struct.pack("<IQ", 0, len(UNKNOWN)) + UNKNOWN)
    with pytest.raises(TransportError):
        await server.wait_closed()
    assert await asyncio.to_thread(left.recv, 1) == b""
    assert not arrived
    left.close()


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
