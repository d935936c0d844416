"""The sockets that the server listens on.

They are bound before anything slow starts, so that a taken port is reported at once.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
from typing import Any

from logitserve.config import Listening

logger = logging.getLogger(__name__)

BACKLOG = 2048
"""Connections that may wait to be accepted; uvicorn's default."""

_ABSENT = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
"""Errors of an address that this machine does not have.

A host name may stand for such an address where IPv6 is off.
"""


class ListenError(Exception):
    """The server cannot listen at its address; the message says why, and names the flag."""


def bind(config: Listening) -> list[socket.socket]:
    """Return a bound socket for each address of the host, or the one that ``--fd`` names.

    They listen already, because another server can bind a port that is only bound. Clients that connect wait
    until the app accepts. With ``listen_when_ready`` they are only bound, and clients are refused. With port 0 every
    address gets the port that the first one was given.

    Raises ListenError when an address is taken or forbidden, and when a host is unknown or none of its addresses is ours.
    """
    if config.fd is not None:
        return [_given(config.fd)]
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        absent: list[OSError] = []
        port = config.port
        for family, address in _addresses(config.host):
            try:
                listener = opened.enter_context(_bound(family, (address[0], port, *address[2:])))
                if not config.listen_when_ready:
                    listener.listen(BACKLOG)
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise ListenError(_reason(error, address[0], port)) from error
                absent.append(error)
                logger.debug("not listening on %s: %s", address[0], error.strerror)
                continue
            port = listener.getsockname()[1]
            sockets.append(listener)
        if not sockets:
            raise ListenError(f"--host {config.host} is no address of this machine") from absent[0]
        opened.pop_all()
        return sockets


def _given(fd: int) -> socket.socket:
    os.set_inheritable(fd, False)  # the engine's process must not hold the port
    listener = socket.socket(fileno=fd)
    if listener.type != socket.SOCK_STREAM:
        listener.detach()
        raise ListenError(f"--fd {fd} is no stream socket")
    return listener


def _bound(family: socket.AddressFamily, address: tuple[Any, ...]) -> socket.socket:
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        opened.pop_all()
        return listener


def listen(listener: socket.socket) -> None:
    """Listen on a bound socket. Raises ListenError where another server has taken its port since it was bound."""
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        address, port = listener.getsockname()[:2]
        raise ListenError(_reason(error, address, port)) from error


def _reason(error: OSError, address: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {address} is taken; choose another by --port, or any free one by --port 0"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"this user may not listen on port {port}; choose one above 1023 by --port"
    return f"--host {address} and --port {port} cannot be listened on: {error.strerror}"


def _addresses(host: str) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    """Return the distinct addresses that a host name stands for."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # UnicodeError is IDNA's
        reason = error.strerror if isinstance(error, OSError) else error
        raise ListenError(f"--host {host!r} is no address and cannot be resolved: {reason}") from error
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def on_loopback(listeners: list[socket.socket]) -> bool:
    """Return whether every listener has a loopback address."""
    return all(
        listener.family in (socket.AF_INET, socket.AF_INET6) and _is_loopback(listener.getsockname()[0])
        for listener in listeners
    )


def _is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
