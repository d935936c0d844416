"""Messages over a local stream socket: one msgpack frame, then the raw bytes of each array it names.

    u32 number of frames | u64 length of each | frame 0: msgpack | frame 1..: array bytes

Little-endian. Nothing is ever unpickled, and a frame that does not decode into the declared message types is an error.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any, Generic, TypeVar

import msgspec

from logitengine.messages import Array

MAX_FRAMES = 1 << 16
MAX_FRAME_BYTES = 1 << 32

M = TypeVar("M")

Buffer = bytes | bytearray | memoryview


class TransportError(Exception):
    """The other side sent something that is no message."""


def encode(message: object) -> list[Buffer]:
    """The buffers to put on the socket, in order. Arrays are not copied."""
    frames: list[Buffer] = []

    def hook(value: object) -> object:
        if isinstance(value, Array):
            frames.append(value.data)
            return (value.dtype, value.shape, len(frames))
        raise NotImplementedError(f"{type(value).__name__} cannot be sent")

    body = msgspec.msgpack.encode(message, enc_hook=hook)
    sizes = [len(body), *(memoryview(frame).nbytes for frame in frames)]
    return [struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes), body, *frames]


class Decoder(Generic[M]):
    """Turns a msgpack frame and its array frames back into a message of the given union of types."""

    def __init__(self, types: Any) -> None:  # a union of Struct types: no narrower annotation exists for it
        self._types = types

    def decode(self, frames: list[bytearray]) -> M:
        def hook(kind: type, value: Any) -> object:
            if kind is not Array:
                raise NotImplementedError(kind)
            dtype, shape, index = value
            if not 1 <= index < len(frames):
                raise TransportError("an array names a frame that was not sent")
            return Array(dtype, tuple(shape), memoryview(frames[index]))

        try:
            message: M = msgspec.msgpack.decode(frames[0], type=self._types, dec_hook=hook)
        except (msgspec.MsgspecError, ValueError, TypeError) as error:
            raise TransportError(str(error)) from error
        return message


def _frame_sizes(count_bytes: Buffer) -> int:
    (count,) = struct.unpack("<I", count_bytes)
    if not 1 <= count <= MAX_FRAMES:
        raise TransportError(f"{count} frames announced")
    return int(count)


def _check_sizes(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if max(sizes) > MAX_FRAME_BYTES:
        raise TransportError("a frame over the limit announced")
    return sizes


class BlockingChannel(Generic[M]):
    """The engine's end: blocking calls, one thread receiving and one sending."""

    def __init__(self, sock: socket.socket, receives: Any) -> None:
        self._sock = sock
        self._decoder: Decoder[M] = Decoder(receives)

    def send(self, message: object) -> None:
        buffers = [memoryview(buffer).cast("B") for buffer in encode(message)]
        buffers = [buffer for buffer in buffers if buffer.nbytes]
        while buffers:
            sent = self._sock.sendmsg(buffers[:64])
            while buffers and sent >= buffers[0].nbytes:
                sent -= buffers.pop(0).nbytes
            if sent:
                buffers[0] = buffers[0][sent:]

    def receive(self) -> M | None:
        """The next message, or None once the other side has closed."""
        count_bytes = self._read(4)
        if count_bytes is None:
            return None
        count = _frame_sizes(count_bytes)
        header = self._read(8 * count)
        if header is None:
            return None
        frames = [self._read(size) for size in _check_sizes(struct.unpack(f"<{count}Q", header))]
        whole = [frame for frame in frames if frame is not None]
        return self._decoder.decode(whole) if len(whole) == count else None

    def _read(self, size: int) -> bytearray | None:
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view.nbytes:
            received = self._sock.recv_into(view)
            if not received:
                return None
            view = view[received:]
        return buffer

    def close(self) -> None:
        self._sock.close()


class AsyncChannel(Generic[M]):
    """The server's end, on an event loop. Array bytes are received straight into the buffer that the message keeps."""

    def __init__(self, sock: socket.socket, receives: Any) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder: Decoder[M] = Decoder(receives)
        self._sending = asyncio.Lock()

    async def send(self, message: object) -> None:
        loop = asyncio.get_running_loop()
        async with self._sending:
            await loop.sock_sendall(self._sock, b"".join(encode(message)))

    async def receive(self) -> M | None:
        """The next message, or None once the other side has closed or died."""
        try:
            count = _frame_sizes(await self._read(4))
            sizes = _check_sizes(struct.unpack(f"<{count}Q", await self._read(8 * count)))
            return self._decoder.decode([await self._read(size) for size in sizes])
        except (EOFError, ConnectionError):
            return None

    async def _read(self, size: int) -> bytearray:
        loop = asyncio.get_running_loop()
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view.nbytes:
            received = await loop.sock_recv_into(self._sock, view)
            if not received:
                raise EOFError
            view = view[received:]
        return buffer

    def close(self) -> None:
        self._sock.close()
