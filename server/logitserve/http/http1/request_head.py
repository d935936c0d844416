"""A request's head, as far as it is looked at before any middleware sees it."""

from __future__ import annotations

import httptools

from logitserve.errors import ApiError, BadRequestError


def check_head(method: str, version: str, headers: list[tuple[bytes, bytes]]) -> None:
    """Refuse what the parser lets pass and others may read otherwise. Raises ApiError."""
    if version not in {"1.0", "1.1"}:
        raise ApiError(505, f"This server speaks HTTP/1.1, not HTTP/{version}.")
    if method == "CONNECT":
        raise ApiError(405, "This server is no proxy: CONNECT is not allowed.")
    hosts = sum(name == b"host" for name, _ in headers)
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        raise BadRequestError("A request has one Host header.", code="invalid_http")
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if codings and version == "1.0":
        raise BadRequestError("HTTP/1.0 has no Transfer-Encoding.", code="invalid_http")
    if codings and [coding.lower() for coding in codings] != [b"chunked"]:
        raise ApiError(501, "The only transfer encoding that this server reads is 'chunked'.")


def split_target(url: bytes) -> tuple[bytes, bytes]:
    """Return the path and the query of a request's target, which may be a whole URL. Raises BadRequestError."""
    try:
        target = httptools.parse_url(url)
    except httptools.HttpParserInvalidURLError:
        target = None
    if target is None or not url.isascii():
        raise BadRequestError("The request's target is not a valid path.", code="invalid_http")
    return target.path or b"/", target.query or b""
