"""The sockets that the server listens on. They are bound before anything slow starts, so a taken port is known at once."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket

from logitserve.config import Listening


def bind(config: Listening) -> list[socket.socket]:
    """Return a bound socket for each address of the host, or the one that ``--fd`` names. Nobody can connect yet.

    With port 0 every address gets the port that the first one was given. Raises OSError when an address is not ours, is
    taken, or cannot be resolved.
    """
    if config.fd is not None:
        os.set_inheritable(config.fd, False)  # the engine's process must not hold the port
        return [socket.socket(fileno=config.fd)]
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        port = config.port
        for family, kind, protocol, address in _addresses(config.host):
            listener = opened.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address, port))
            port = listener.getsockname()[1]
            sockets.append(listener)
        opened.pop_all()
        return sockets


def _addresses(host: str) -> list[tuple[socket.AddressFamily, socket.SocketKind, int, str]]:
    """Return the distinct addresses that a host name stands for."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(
        dict.fromkeys((family, kind, protocol, str(ip[0])) for family, kind, protocol, _, ip in found)
    )


def on_loopback(listeners: list[socket.socket]) -> bool:
    """Return whether only this machine can connect, by an address."""
    return all(
        listener.family in (socket.AF_INET, socket.AF_INET6) and _is_loopback(listener.getsockname()[0])
        for listener in listeners
    )


def _is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
