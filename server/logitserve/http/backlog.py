"""The close of a listening socket: every client that has connected is accepted, the next is refused."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import select
import socket
import struct
import sys
from collections.abc import Collection

logger = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 0.2
"""Time for the handshakes under way to end: longer than a round trip to a client."""

TURNS = 10_000
"""Most turns of the event loop that wait for the backlog, where newcomers cannot be held back."""

SO_ATTACH_FILTER = 26

# Offsets are from the start of the TCP header; byte 13 has the flags.
ONLY_KNOWN_CLIENTS = (
    (0x30, 0, 0, 13),  # A = flags
    (0x54, 0, 0, 0x12),  # A &= SYN | ACK
    (0x15, 0, 1, 0x02),  # if A is not SYN alone, skip one
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFFFFFF),  # keep
)
"""A classic BPF program that drops the packet by which a client opens a connection."""


async def accept_backlog(listeners: Collection[socket.socket], *, are_ours: bool) -> None:
    """Return when every connection that has come is accepted, so that closing the listeners resets none.

    A closing socket resets the connections in its backlog. So newcomers' first packets are dropped until it
    is closed. Clients send them again within a second and are refused, by which they know that nothing was
    lost. Without ``are_ours`` other processes may listen on the sockets, so newcomers are not held back.
    """
    if are_ours:
        for listener in listeners:
            _hold_newcomers(listener)
        await asyncio.sleep(HANDSHAKE_SECONDS)
    waiting = select.poll()
    for listener in listeners:
        waiting.register(listener, select.POLLIN)
    for _ in range(TURNS):
        if not any(event & select.POLLIN for _, event in waiting.poll(0)):
            return
        await asyncio.sleep(0)  # lets the event loop accept


def _hold_newcomers(listener: socket.socket) -> None:
    if sys.platform != "linux":
        return
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in ONLY_KNOWN_CLIENTS)
    held = ctypes.create_string_buffer(program, len(program))
    pointer = struct.pack("HP", len(ONLY_KNOWN_CLIENTS), ctypes.addressof(held))
    try:
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, pointer)
    except OSError as error:  # a sandbox may forbid it
        logger.warning("newcomers cannot be held back while the server ends: %s", error)
