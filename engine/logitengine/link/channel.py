"""Messages over a local stream socket: one msgpack frame, then a raw frame for each array that the message names.

    u32 number of arrays | u64 length of the message | u64 length of each array | message: msgpack | arrays: raw bytes

Little-endian. Small arrays are inside the message. Nothing is ever unpickled, and a frame that does not decode into the
declared message types is an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, cast

import msgspec

from logitengine.link.messages import Array

INLINE_BYTES = 4096
"""Size up to which arrays travel inside the message: a read of their own would cost more than the copy."""

MAX_ARRAYS = 1 << 16
MAX_BYTES = 1 << 32
PREFIX = struct.Struct("<IQ")

STAGE_BYTES = 1 << 16
"""Bytes read at once while no array is being received: many small messages, or one message and its first arrays."""

BUFFERS_AT_ONCE = 64
"""Number of buffers that one system call takes on every system."""

M = TypeVar("M")

Buffer = bytes | bytearray | memoryview


class TransportError(Exception):
    """The other side sent bytes that are not a message."""


def encode(message: object) -> list[Buffer]:
    """Return the buffers to put on the socket, in order. Arrays are not copied."""
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
    """Decoder of a msgpack frame and its arrays into a message of the given union of types."""

    def __init__(self, types: Any) -> None:  # a union of Struct types: no narrower annotation exists for it
        self._decoder = msgspec.msgpack.Decoder(types, dec_hook=self._array)
        self._arrays: list[bytearray] = []

    def decode(self, body: Buffer, arrays: list[bytearray]) -> M:
        self._arrays = arrays
        try:
            message: M = self._decoder.decode(body)
        except (msgspec.MsgspecError, ValueError, TypeError) as error:
            raise TransportError(str(error)) from error
        finally:
            self._arrays = []
        return message

    def _array(self, kind: type, value: Any) -> object:
        if kind is not Array:
            raise NotImplementedError(kind)
        dtype, shape, index = value
        if isinstance(index, bytes):
            return Array(dtype, tuple(shape), index)
        if not 0 <= index < len(self._arrays):
            raise TransportError("a message names an array that was not sent")
        return Array(dtype, tuple(shape), memoryview(self._arrays[index]))


class MessageReader(Generic[M]):
    """Splits a stream of bytes into messages of the given union of types, wherever the reads end.

    The caller reads into ``space()`` and reports the byte count to ``received``. The bytes of a large array
    go straight into the buffer that its message keeps.
    """

    def __init__(self, types: Any) -> None:
        self._decoder: Decoder[M] = Decoder(types)
        self._stage = memoryview(bytearray(STAGE_BYTES))
        self._staged = 0
        self._message: M | None = None
        self._missing: deque[memoryview] = deque()  # of the current message's arrays

    def space(self) -> memoryview:
        """Return the memory for the next bytes; never empty."""
        return self._missing[0] if self._missing else self._stage[self._staged :]

    def received(self, count: int) -> Iterator[M]:
        """Yield the messages completed by ``count`` more bytes in ``space()``. Raises TransportError."""
        if self._missing:
            self._missing[0] = self._missing[0][count:]
            yield from self._whole()
            return
        self._staged += count
        start = 0
        while (end := self._take(start)) is not None:
            start = end
            yield from self._whole()
        self._keep_from(start)

    def _take(self, start: int) -> int | None:
        """Take the message staged from ``start`` on and the staged part of its arrays; return their end, or None."""
        if self._missing or self._staged - start < PREFIX.size:
            return None
        count, body_size = self._announced(start)
        sizes_start = start + PREFIX.size
        body_start = sizes_start + 8 * count
        end = body_start + body_size
        if end > self._staged:
            return None
        sizes: tuple[int, ...] = struct.unpack_from(f"<{count}Q", self._stage, sizes_start)
        if max(sizes, default=0) > MAX_BYTES:
            raise TransportError(f"an array of {max(sizes)} bytes announced")
        arrays = [bytearray(size) for size in sizes]
        self._message = self._decoder.decode(self._stage[body_start:end], arrays)
        for array in arrays:
            staged = min(len(array), self._staged - end)
            array[:staged] = self._stage[end : end + staged]
            self._missing.append(memoryview(array)[staged:])
            end += staged
        return end

    def _announced(self, start: int) -> tuple[int, int]:
        """Return the number of arrays and the size in bytes of the message that begins at ``start``."""
        count, body_size = PREFIX.unpack_from(self._stage, start)
        if count > MAX_ARRAYS or body_size > MAX_BYTES:
            raise TransportError(f"{count} arrays and a message of {body_size} bytes announced")
        return count, body_size

    def _whole(self) -> Iterator[M]:
        """Yield the message that was taken, if no byte of it is missing."""
        while self._missing and not self._missing[0].nbytes:
            self._missing.popleft()
        if not self._missing and self._message is not None:
            message, self._message = self._message, None
            yield message

    def _keep_from(self, start: int) -> None:
        """Move the bytes staged from ``start`` on to the front of a stage with room for the message that they begin."""
        rest = self._stage[start : self._staged]
        needed = 0
        if len(rest) >= PREFIX.size:
            count, body_size = self._announced(start)
            needed = PREFIX.size + 8 * count + body_size
        if needed > len(self._stage) or (needed <= STAGE_BYTES < len(self._stage)):
            self._stage = memoryview(bytearray(max(STAGE_BYTES, needed)))
        if len(rest):
            self._stage[: len(rest)] = bytes(rest)
        self._staged = len(rest)


class BlockingChannel(Generic[M]):
    """The engine's end, for one thread that receives and any number that send.

    Receiving waits and sending never does: a thread of the channel sends, in order, the bytes that the socket
    does not take at once.
    """

    def __init__(self, sock: socket.socket, receives: Any) -> None:
        self._sock = sock
        self._reader: MessageReader[M] = MessageReader(receives)
        self._received: deque[M] = deque()
        self._rests: queue.SimpleQueue[list[memoryview] | None] = queue.SimpleQueue()
        self._sending = threading.Lock()  # held for one system call that does not wait
        self._num_left_to_thread = 0  # written under the lock
        self._num_sent_by_thread = 0  # written by the channel's thread
        self._sender = threading.Thread(target=self._send_rests, name="send", daemon=True)
        self._sender.start()

    def send(self, message: object) -> None:
        """Send a message. Raises OSError when the other side is gone."""
        rest = [view for buffer in encode(message) if (view := memoryview(buffer).cast("B")).nbytes]
        with self._sending:
            if self._num_sent_by_thread == self._num_left_to_thread:
                with contextlib.suppress(BlockingIOError):
                    rest = self._send_some(rest, socket.MSG_DONTWAIT)
            if rest:
                self._num_left_to_thread += 1
                self._rests.put(rest)

    def _send_some(self, buffers: list[memoryview], flags: int = 0) -> list[memoryview]:
        """Send with one system call and return the buffers that are left."""
        sent = self._sock.sendmsg(buffers[:BUFFERS_AT_ONCE], (), flags)
        done = 0
        while done < len(buffers) and sent >= buffers[done].nbytes:
            sent -= buffers[done].nbytes
            done += 1
        rest = buffers[done:]
        if sent:
            rest[0] = rest[0][sent:]
        return rest

    def _send_rests(self) -> None:
        while (rest := self._rests.get()) is not None:
            while rest:
                try:
                    rest = self._send_some(rest)
                except OSError:
                    return  # the receiving thread reports that the other side is gone
            self._num_sent_by_thread += 1

    def receive(self) -> M | None:
        """Return the next message, or None once the other side has closed."""
        while not self._received:
            count = self._sock.recv_into(self._reader.space())
            if not count:
                return None
            self._received.extend(self._reader.received(count))
        return self._received.popleft()

    def flush(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds until everything is sent, then tell the other side that nothing follows."""
        self._rests.put(None)
        self._sender.join(timeout)
        with contextlib.suppress(OSError):  # the other side has closed
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._sock.close()


class AsyncChannel(asyncio.BufferedProtocol, Generic[M]):
    """The server's end, on an event loop. It passes every message on as it arrives."""

    def __init__(self, receives: Any, on_message: Callable[[M], None]) -> None:
        self._reader: MessageReader[M] = MessageReader(receives)
        self._on_message = on_message
        self._transport: asyncio.Transport | None = None
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def over(
        cls, sock: socket.socket, receives: Any, on_message: Callable[[M], None]
    ) -> AsyncChannel[M]:
        """Return a channel over a connected socket, which the channel owns from then on."""
        channel = cls(receives, on_message)
        await channel.open(sock)
        return channel

    async def open(self, sock: socket.socket) -> None:
        """Start to communicate over a connected socket, which the channel owns from then on."""
        await asyncio.get_running_loop().connect_accepted_socket(lambda: self, sock)

    def send(self, message: object) -> None:
        """Send a message, or nothing once the other side has closed or died."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.writelines(encode(message))

    async def wait_closed(self) -> None:
        """Wait until the other side has closed or died.

        Raises TransportError if it sent bytes that are not a message.
        """
        await asyncio.shield(self._closed)

    def close(self) -> None:
        """Close once everything has been sent."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # The transport is that of a stream socket, though uvloop's is no subclass of asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        return self._reader.space()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for message in self._reader.received(nbytes):
                self._on_message(message)
        except TransportError as error:
            self._end(error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - however it was lost
        self._end(None)

    def _end(self, error: TransportError | None) -> None:
        if self._closed.done():
            return
        if error is None:
            self._closed.set_result(None)
        else:
            self._closed.set_exception(error)
