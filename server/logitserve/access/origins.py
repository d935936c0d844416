"""Hosts and web origins: parsing of their headers, and the rules by which they may call."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

ANY = "*"
OPAQUE = "null"
"""The origin of a sandboxed page, of a file in some browsers, and of a form whose page hides its own."""

DEFAULT_PORTS = {"http": 80, "https": 443}

_HOST = re.compile(
    r"(?P<name>[a-z0-9._~!$&'()*+,;=%-]+|\[(?P<ipv6>[0-9a-f:.]+)\])(?::(?P<port>[0-9]{0,5}))?", re.IGNORECASE
)
_ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>.*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Host:
    """A host and its port, in one spelling for comparison. ``port`` None is the scheme's own."""

    name: str
    port: int | None
    is_address: bool

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return the host that a ``Host`` header names, or None when it names none."""
        match = _HOST.fullmatch(text)
        if match is None:
            return None
        port = int(match["port"]) if match["port"] else None
        name = match["name"].lower().removesuffix(".")
        try:
            address = ipaddress.ip_address(match["ipv6"] or name)
        except ValueError:
            return None if match["ipv6"] or not name else cls(name, port, is_address=False)
        return cls(str(address), port, is_address=True)

    def settled_port(self, scheme: str) -> int | None:
        """Return the port, which may be this scheme's own."""
        return DEFAULT_PORTS.get(scheme) if self.port is None else self.port


@dataclass(frozen=True, slots=True)
class Origin:
    """A web origin: scheme, host and port, or a scheme alone, as in ``file://``."""

    scheme: str
    name: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return the origin that an ``Origin`` header names.

        ``null`` names none, nor does a value with a path.
        """
        match = _ORIGIN.fullmatch(text)
        if match is None:
            return None
        scheme = match["scheme"].lower()
        if not match["host"]:
            return None if scheme in DEFAULT_PORTS else cls(scheme, "", None)
        host = Host.parse(match["host"])
        return None if host is None else cls(scheme, host.name, host.settled_port(scheme))


class OriginRules:
    """Rules of the hosts that are this server's, and of the web origins that may call it."""

    def __init__(self, cors_origins: Sequence[str], allowed_hosts: Sequence[str]) -> None:
        """Take the values of --cors-origin and --allowed-host, checked."""
        self._admits_any_origin = ANY in cors_origins
        self._admits_opaque = self._admits_any_origin or OPAQUE in cors_origins
        self._schemes = {_scheme_of_all(origin) for origin in cors_origins} - {None}
        self._origins = {Origin.parse(origin) for origin in cors_origins} - {None}
        self._admits_any_host = ANY in allowed_hosts
        self._hosts = frozenset(name.lower().removesuffix(".") for name in allowed_hosts)

    def is_known(self, host: Host) -> bool:
        """Return whether no web page can rebind the name: an address, localhost, or an allowed name."""
        return (
            host.is_address or host.name == "localhost" or host.name in self._hosts or self._admits_any_host
        )

    def admits(self, text: str, host: Host | None) -> bool:
        """Return whether a page of this origin may call: our own pages, and those that --cors-origin names."""
        if text == OPAQUE:
            return self._admits_opaque
        if self._admits_any_origin:
            return True
        origin = Origin.parse(text)
        if origin is None:
            return False
        return (
            origin in self._origins
            or origin.scheme in self._schemes
            or (host is not None and self._is_own(origin, host))
        )

    def _is_own(self, origin: Origin, host: Host) -> bool:
        """Return whether the page came from here. Its scheme may be the proxy's, which ends TLS."""
        return (
            origin.scheme in DEFAULT_PORTS
            and (origin.name, origin.port) == (host.name, host.settled_port(origin.scheme))
            and self.is_known(host)
        )


def _scheme_of_all(text: str) -> str | None:
    """Return the scheme of ``scheme://*``, which stands for each of the scheme's origins."""
    scheme, separator, host = text.partition("://")
    return scheme.lower() if separator and host == ANY else None


def check_origins(origins: list[str]) -> list[str]:
    """Return the values of --cors-origin. Raises ValueError for a value that is no origin."""
    for text in origins:
        if text not in (ANY, OPAQUE) and Origin.parse(text) is None:
            msg = (
                f"{text!r} is no origin: name a scheme and a host without a path, as in https://app.example or "
                "app://*, or '*' for all"
            )
            raise ValueError(msg)
    return origins


def check_hosts(names: list[str]) -> list[str]:
    """Return the values of --allowed-host. Raises ValueError for a value that is no host's name."""
    for name in names:
        host = Host.parse(name)
        if name != ANY and (host is None or ":" in name or ANY in name):
            msg = f"{name!r} is no host: give its name without scheme and port, as in api.example, or '*' for all"
            raise ValueError(msg)
    return names
