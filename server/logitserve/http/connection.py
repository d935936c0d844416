"""The client connection behind a request: its facts for a middleware, and the possible changes."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios

EXTENSION = "logitserve.connection"
"""The key in ``scope["extensions"]`` under which our uvicorn protocol puts a Connection. Other servers set none."""

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""Value of SO_LINGER: closing the socket throws away the bytes that the kernel still holds."""


class Connection:
    """An open client connection, until ``release``."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport: asyncio.Transport | None = transport

    def release(self) -> None:
        """Forget the transport, which is closing its socket. The socket's number may soon be another's."""
        self._transport = None

    def num_untaken_bytes(self) -> int:
        """Return the number of written bytes, here and in the kernel, that the client has not acknowledged.

        While nothing is written, only the client lowers this number, by reading. Its receive buffer makes room in steps of
        a segment or of a sixteenth of the buffer. The bytes in this process alone would be coarser by megabytes: the kernel
        asks for more only when a third of its buffer is free.
        """
        if self._transport is None:
            return 0
        number = self._transport.get_extra_info("socket").fileno()
        try:
            (in_kernel,) = struct.unpack("i", fcntl.ioctl(number, termios.TIOCOUTQ, bytes(4)))
        except OSError:
            in_kernel = 0
        return self._transport.get_write_buffer_size() + int(in_kernel)

    def num_unread_bytes(self) -> int:
        """Return the number of bytes that have come and are still in the kernel."""
        if self._transport is None:
            return 0
        number = self._transport.get_extra_info("socket").fileno()
        try:
            (unread,) = struct.unpack("i", fcntl.ioctl(number, termios.FIONREAD, bytes(4)))
        except OSError:
            return 0
        return int(unread)

    def limit_unsent(self, nbytes: int | None) -> None:
        """Make sending wait while this process holds more than ``nbytes``. None restores the usual limit."""
        if self._transport is not None:
            self._transport.set_write_buffer_limits(high=nbytes)

    def abort(self) -> None:
        """Close at once and drop the unsent bytes. The client's next read fails."""
        if self._transport is not None:
            self._transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE
            )
            self._transport.abort()
