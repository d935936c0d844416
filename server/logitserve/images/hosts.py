"""Hosts that images may be fetched from, and addresses that no request may make the server connect to."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

USUAL_PORTS = frozenset({80, 443})
"""Ports of a host that is listed without one."""

_ENTRY = re.compile(r"(?P<name>[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)(?::(?P<port>[0-9]{1,5}))?")

_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses whose last 32 bits are an IPv4 address that a gateway connects to."""

_TUNNELLED = (ipaddress.ip_network("2002::/16"), ipaddress.ip_network("2001::/32"))
"""IPv6 addresses of tunnels that hold an IPv4 address: 6to4 and Teredo."""


class ImageHosts:
    """The values of --image-hosts: a name with the usual ports, or with one of its own."""

    def __init__(self, entries: Sequence[str]) -> None:
        self._allowed: set[tuple[str, int]] = set()
        for entry in entries:
            name, port = _parse(entry)
            self._allowed |= {(name, one) for one in (USUAL_PORTS if port is None else {port})}

    def __bool__(self) -> bool:
        return bool(self._allowed)

    def allows(self, name: str, port: int) -> bool:
        """Return whether a host, by its ASCII name in lower case, is listed with this port."""
        return (name, port) in self._allowed


def check_image_hosts(entries: list[str]) -> list[str]:
    """Return the values of --image-hosts. Raises ValueError for a value that is no host."""
    for entry in entries:
        _parse(entry)
    return entries


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the public internet, whichever way it is written."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False  # with the zone of a link, for example
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _TRANSLATED:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif any(ip in network for network in _TUNNELLED):
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _parse(entry: str) -> tuple[str, int | None]:
    match = _ENTRY.fullmatch(entry.lower())
    port = None if match is None or match["port"] is None else int(match["port"])
    if match is None or (port is not None and not 0 < port < 1 << 16):
        msg = (
            f"{entry!r} is no host: give its ASCII name without a scheme, as in images.example, and a port where it is "
            "neither 80 nor 443, as in images.example:8443"
        )
        raise ValueError(msg)
    return match["name"], port
