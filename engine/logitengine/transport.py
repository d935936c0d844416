"""Messages over a local stream socket: one msgpack frame, then a raw frame for each array that it names.

    u32 number of arrays | u64 length of the message | u64 length of each array | message: msgpack | arrays: raw bytes

Little-endian. Small arrays are inside the message. Nothing is ever unpickled, and a frame that does not decode into the
declared message types is an error.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any, Generic, TypeVar

import msgspec

from logitengine.messages import Array

INLINE_BYTES = 4096
"""Arrays up to this size travel inside the message: a read of their own costs more than the copy."""

MAX_ARRAYS = 1 << 16
MAX_BYTES = 1 << 32
PREFIX = struct.Struct("<IQ")

M = TypeVar("M")

Buffer = bytes | bytearray | memoryview


class TransportError(Exception):
    """The other side sent something that is no message."""


def encode(message: object) -> list[Buffer]:
    """The buffers to put on the socket, in order. Arrays are not copied."""
    arrays: list[Buffer] = []

    def hook(value: object) -> object:
        if isinstance(value, Array):
            if value.nbytes <= INLINE_BYTES:
                return (value.dtype, value.shape, bytes(value.data))
            arrays.append(value.data)
            return (value.dtype, value.shape, len(arrays) - 1)
        raise NotImplementedError(f"{type(value).__name__} cannot be sent")

    body = msgspec.msgpack.encode(message, enc_hook=hook)
    sizes = [memoryview(array).nbytes for array in arrays]
    return [PREFIX.pack(len(sizes), len(body)) + struct.pack(f"<{len(sizes)}Q", *sizes) + body, *arrays]


class Decoder(Generic[M]):
    """Turns a msgpack frame and its arrays back into a message of the given union of types."""

    def __init__(self, types: Any) -> None:  # a union of Struct types: no narrower annotation exists for it
        self._types = types

    def decode(self, body: Buffer, arrays: list[bytearray]) -> M:
        def hook(kind: type, value: Any) -> object:
            if kind is not Array:
                raise NotImplementedError(kind)
            dtype, shape, index = value
            if isinstance(index, bytes):
                return Array(dtype, tuple(shape), index)
            if not 0 <= index < len(arrays):
                raise TransportError("a message names an array that was not sent")
            return Array(dtype, tuple(shape), memoryview(arrays[index]))

        try:
            message: M = msgspec.msgpack.decode(body, type=self._types, dec_hook=hook)
        except (msgspec.MsgspecError, ValueError, TypeError) as error:
            raise TransportError(str(error)) from error
        return message


def _head_size(prefix: Buffer) -> int:
    """Bytes of the array lengths and of the message, which are read together."""
    count, body_size = PREFIX.unpack(prefix)
    if count > MAX_ARRAYS or body_size > MAX_BYTES:
        raise TransportError(f"{count} arrays and a message of {body_size} bytes announced")
    return 8 * int(count) + int(body_size)


def _split_head(prefix: Buffer, head: bytearray) -> tuple[tuple[int, ...], memoryview]:
    """The arrays' lengths, and the message."""
    (count, _) = PREFIX.unpack(prefix)
    sizes: tuple[int, ...] = struct.unpack_from(f"<{count}Q", head)
    if max(sizes, default=0) > MAX_BYTES:
        raise TransportError(f"an array of {max(sizes)} bytes announced")
    return sizes, memoryview(head)[8 * count :]


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
        prefix = self._read(PREFIX.size)
        head = None if prefix is None else self._read(_head_size(prefix))
        if prefix is None or head is None:
            return None
        sizes, body = _split_head(prefix, head)
        arrays = [array for size in sizes if (array := self._read(size)) is not None]
        return self._decoder.decode(body, arrays) if len(arrays) == len(sizes) else None

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
            prefix = await self._read(PREFIX.size)
            sizes, body = _split_head(prefix, await self._read(_head_size(prefix)))
            return self._decoder.decode(body, [await self._read(size) for size in sizes])
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
