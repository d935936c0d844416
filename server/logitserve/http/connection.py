"""What a middleware may know of the connection that an answer leaves by, and do to it."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios

EXTENSION = "logitserve.connection"
"""Where in ``scope["extensions"]`` our protocol class puts a request's Connection. Other servers have none."""

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER on, for no time: closing throws away what the kernel still holds."""


class Connection:
    """An open client connection, until ``release``."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport: asyncio.Transport | None = transport

    def release(self) -> None:
        """The transport is closing its socket, whose number may soon be another's."""
        self._transport = None

    def num_untaken_bytes(self) -> int:
        """Bytes written that the client's machine has not acknowledged, be they in this process or in the kernel.

        While nothing is written only the client lowers this, by reading: its own buffer makes room, in steps of a segment
        or of a sixteenth of that buffer. The process's share alone is coarser by megabytes, since the kernel asks for more
        only when a third of its buffer is free.
        """
        if self._transport is None:
            return 0
        number = self._transport.get_extra_info("socket").fileno()
        try:
            (in_kernel,) = struct.unpack("i", fcntl.ioctl(number, termios.TIOCOUTQ, bytes(4)))
        except OSError:
            in_kernel = 0
        return self._transport.get_write_buffer_size() + int(in_kernel)

    def limit_unsent(self, nbytes: int | None) -> None:
        """Sending waits while this process holds more than ``nbytes`` that the kernel has not taken; None: as usual."""
        if self._transport is not None:
            self._transport.set_write_buffer_limits(high=nbytes)

    def abort(self) -> None:
        """Close at once, without waiting for what is unsent: the client's next read fails."""
        if self._transport is not None:
            self._transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE
            )
            self._transport.abort()
