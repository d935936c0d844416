"""Checks of a request's head, before any middleware sees it."""

from __future__ import annotations

import httptools
from httptools.parser.url_parser import URL

from logitserve.access.origins import DEFAULT_PORTS, Host
from logitserve.config import RequestBounds
from logitserve.errors import ApiError, BadRequestError


class HeadMeter:
    """Counts the bytes and headers of a request's head and of its trailer, which have one bound together.

    The parser reports a header when it ends, and keeps one without end. So unreported bytes count too.
    """

    def __init__(self, bounds: RequestBounds) -> None:
        self._bounds = bounds
        self._num_bytes = 0
        self._num_headers = 0
        self._num_untold = 0

    def begin(self) -> None:
        """Count for the next request."""
        self._num_bytes = self._num_headers = self._num_untold = 0

    def fed(self, nbytes: int) -> None:
        """Count bytes that the parser is about to get."""
        self._num_untold += nbytes

    def told(self) -> None:
        """Remember that the parser has reported something."""
        self._num_untold = 0

    def count_target(self, nbytes: int) -> None:
        """Count a piece of the target. Raises ApiError."""
        self.told()
        self._num_bytes += nbytes
        if self._num_bytes > self._bounds.max_header_bytes:
            raise self._too_large()

    def count_header(self, nbytes: int) -> None:
        """Count a header. Raises ApiError."""
        self._num_headers += 1
        if self._num_headers > self._bounds.max_headers:
            raise ApiError(
                431, f"The request has more than {self._bounds.max_headers} headers (--max-headers)."
            )
        self.count_target(nbytes)

    def check_untold(self) -> None:
        """Refuse a header, or a chunk's head, without end. Raises ApiError."""
        if self._num_untold > self._bounds.max_header_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        limit = self._bounds.max_header_bytes
        return ApiError(
            431, f"The request's head, or its trailer, is larger than {limit} bytes (--max-header-bytes)."
        )


def check_head(method: str, version: str, headers: list[tuple[bytes, bytes]]) -> None:
    """Refuse heads that the parser accepts and other servers may read differently. Raises ApiError."""
    if version not in {"1.0", "1.1"}:
        raise ApiError(505, f"This server speaks HTTP/1.1, not HTTP/{version}.")
    if method == "CONNECT":
        raise ApiError(405, "This server is no proxy: CONNECT is not allowed.")
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if codings and version == "1.0":
        raise BadRequestError("HTTP/1.0 has no Transfer-Encoding.", code="invalid_http")
    if codings and [coding.lower() for coding in codings] != [b"chunked"]:
        raise ApiError(501, "The only transfer encoding that this server reads is 'chunked'.")


def split_target(url: bytes, headers: list[tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
    """Return the path and the query of a request's target, which may be a whole URL. Raises BadRequestError.

    Access is decided by Host. RFC 9112 3.2.2 lets a whole URL overrule it, and requires the same host in
    both.
    """
    try:
        target = httptools.parse_url(url)
    except httptools.HttpParserInvalidURLError:
        target = None
    if target is None or not url.isascii():
        raise BadRequestError("The request's target is not a valid path.", code="invalid_http")
    if target.host is not None and not all(
        _is_host(target, value) for name, value in headers if name == b"host"
    ):
        raise BadRequestError(
            "The request's target is on another host than its Host header.", code="invalid_host"
        )
    return target.path or b"/", target.query or b""


def _is_host(target: URL, value: bytes) -> bool:
    """Return whether a Host header names the host and the port of a whole URL."""
    name, scheme = target.host.decode("ascii"), target.schema.decode("ascii").lower()
    asked = Host.parse(f"[{name}]" if ":" in name else name)
    host = Host.parse(value.decode("latin-1"))
    port = target.port or DEFAULT_PORTS.get(scheme)
    return (
        asked is not None
        and host is not None
        and (asked.name, port) == (host.name, host.settled_port(scheme))
    )
